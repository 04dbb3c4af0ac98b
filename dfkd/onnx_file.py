"""A classifier as one ONNX file that needs nothing else: images in, logits out, normalisation and names inside."""

import json
from typing import Any

import torch
from torch import Tensor, nn

import dfkd
from dfkd.errors import UsageError
from dfkd.teachers import Classifier
from dfkd_engine.backends.packages import missing
from dfkd_engine.export import quiet

INPUT, OUTPUT, BATCH = "images", "logits", "batch"
DTYPES = {"float32": torch.float32, "uint8": torch.uint8}
# Of the largest logit: float32 in another order of sums, over some fifty layers.
TOLERANCE = 1e-4
LARGEST = 1_800_000_000  # bytes of weights: protobuf holds 2 GiB in one file


class _Deployed(nn.Module):
    """images [B, 3, size, size] as they come from a file -> logits float32 [B, C]."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.module = classifier.module
        self.register_buffer("mean", torch.tensor(classifier.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(classifier.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.float() / 255
        logits: Tensor = self.module((images - self.get_buffer("mean")) / self.get_buffer("std"))
        return logits


def require_packages() -> None:
    """Raise UsageError unless ONNX files can be written and tried here."""
    if absent := missing("onnx", "onnxscript", "onnxruntime"):
        raise UsageError("no ONNX file can be written", f"{', '.join(absent)} absent", "pip install 'dfkd[onnx]'")


def onnx_model(classifier: Classifier, dtype: str, opset: int) -> bytes:
    """The file's content. Input `images` [batch, 3, size, size], float32 in 0..1 or uint8; output `logits`.

    dtype: "float32" or "uint8", of the images. The metadata of the model are class_names (a JSON list), architecture,
    input_size, mean and std (both applied inside), and dfkd's version.
    Raises UsageError: the packages are absent, the network cannot be exported, or not in that opset.
    """
    require_packages()
    deployed = _Deployed(classifier).cpu().eval()
    size = sum(value.numel() * value.element_size() for value in deployed.state_dict().values())
    if size > LARGEST:
        raise UsageError(f"{classifier.architecture} has {size / 1e9:.1f} GB of weights", "an ONNX file holds 2 GB")
    side = classifier.input_size
    example = torch.zeros(2, 3, side, side).to(DTYPES[dtype])
    try:
        with quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                deployed,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),
                verbose=False,
            )
            model = program.model_proto
    except Exception as error:  # exporter, version converter and torch.export share no base
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"{classifier.architecture} cannot be exported", why, "try another --opset") from error
    written = {entry.domain: entry.version for entry in model.opset_import}[""]
    if written != opset:
        raise UsageError(
            f"--opset {opset}", f"{classifier.architecture} was written in opset {written}", "ask for that one"
        )
    for node in model.graph.node:
        del node.metadata_props[:]  # the exporter's notes name files of this machine
    known = {
        "class_names": json.dumps(classifier.class_names),
        "architecture": classifier.architecture,
        "input_size": str(side),
        "mean": json.dumps(classifier.mean),
        "std": json.dumps(classifier.std),
        "dfkd": dfkd.__version__,
    }
    for key, value in known.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    content: bytes = model.SerializeToString()
    return content


@torch.no_grad()
def verify(content: bytes, classifier: Classifier, dtype: str) -> float:
    """The largest difference between ONNX Runtime's logits and torch's, over torch's largest, for 1 and for 5 images.

    Raises UsageError above TOLERANCE, and for a model that ONNX Runtime does not take.
    """
    import onnxruntime

    side, worst = classifier.input_size, 0.0
    generator = torch.Generator().manual_seed(0)
    deployed = _Deployed(classifier).cpu().eval()
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        for rows in (1, 5):
            images = torch.randint(0, 256, (rows, 3, side, side), generator=generator, dtype=torch.uint8)
            images = images if dtype == "uint8" else images.float() / 255
            wanted = deployed(images)
            found = torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])
            worst = max(worst, float((found - wanted).abs().max() / wanted.abs().max()))
    except Exception as error:  # onnxruntime's exceptions share no other base
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"ONNX Runtime does not run {classifier.architecture}", why, "try another --opset") from error
    if not worst <= TOLERANCE:
        raise UsageError(
            f"the ONNX file of {classifier.architecture} differs from torch by {worst:.1e} of the largest logit",
            f"at most {TOLERANCE:.0e} is taken",
            "nothing was written; try another --opset",
        )
    return worst
