"""What is exported of a classifier: images in, logits out, normalisation inside; and how a file is tried against it."""

import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

import dfkd
from dfkd.errors import UsageError
from dfkd.teachers import Classifier

INPUT, OUTPUT, BATCH = "images", "logits", "batch"
DTYPES = {"float32": torch.float32, "uint8": torch.uint8}
# Of the largest logit: float32 in another order of sums, over some fifty layers.
TOLERANCE = 1e-4
AGAIN = "nothing was written; try another --format or --opset"

Run = Callable[[Tensor], Tensor]


class Deployed(nn.Module):
    """images [B, 3, size, size] as they come from a file -> logits float32 [B, C]."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.module = classifier.tried().module
        self.register_buffer("mean", torch.tensor(classifier.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(classifier.std).view(1, 3, 1, 1))
        self.cpu().eval()

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.float() / 255
        logits: Tensor = self.module((images - self.get_buffer("mean")) / self.get_buffer("std"))
        return logits


def example(classifier: Classifier, dtype: str) -> Tensor:
    """Two images, as `dtype` ("float32" or "uint8") has them."""
    side = classifier.input_size
    return torch.zeros(2, 3, side, side).to(DTYPES[dtype])


def metadata(classifier: Classifier) -> dict[str, str]:
    """class_names (a JSON list), architecture, input_size, mean and std (both applied inside), resize (how
    larger images are to be brought to that size), and dfkd's version."""
    return {
        "class_names": json.dumps(classifier.class_names),
        "architecture": classifier.architecture,
        "input_size": str(classifier.input_size),
        "mean": json.dumps(classifier.mean),
        "std": json.dumps(classifier.std),
        "resize": classifier.resize,
        "dfkd": dfkd.__version__,
    }


@torch.no_grad()
def verify(run: Run, classifier: Classifier, dtype: str, name: str) -> float:
    """The largest difference between the file's logits and the network's, over its largest, for 1 and for 5 images.

    run: the file, by what will run it. name: of the file, for people.
    Raises UsageError above TOLERANCE, for logits of another shape or that are not finite, and where `run` fails.
    """
    side, deployed, differences = classifier.input_size, Deployed(classifier), []
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 5):
        images = torch.randint(0, 256, (rows, 3, side, side), generator=generator, dtype=torch.uint8)
        images = images if dtype == "uint8" else images.float() / 255
        wanted = deployed(images)
        try:
            found = run(images)
        except Exception as error:  # whatever the runtime raises
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UsageError(f"{name} of {classifier.architecture} does not run", why, AGAIN) from error
        if found.shape != wanted.shape:
            why = f"of {rows} images it answers {tuple(found.shape)}, torch {tuple(wanted.shape)}"
            raise UsageError(f"{name} of {classifier.architecture} answers in another shape", why, AGAIN)
        differences.append((found - wanted).abs().max() / wanted.abs().max().clamp_min(torch.finfo().tiny))
    worst = float(torch.stack(differences).max())  # NaN where any is
    if not worst <= TOLERANCE:
        what = f"{name} of {classifier.architecture} differs from torch by {worst:.1e} of the largest logit"
        raise UsageError(what, f"at most {TOLERANCE:.0e} is taken", AGAIN)
    return worst
