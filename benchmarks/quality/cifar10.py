"""CIFAR-10 as two worlds: half of the training images for teachers, half for priors, and what sets them apart.

    python -m benchmarks.quality.cifar10 --data cifar:DATA --shift sketch --out runs/world

writes OUT/teacher and OUT/prior, each in the form of CIFAR-10's .bin files, so `cifar:OUT/teacher` names one: of the
training images those of even and those of odd places in the order of the files, and all test images. The teacher's are
shifted, its test images too; the prior's are photos. DATA may be torchvision's pickles, Parquet files or class folders.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd.data import ImageFiles
from dfkd.errors import UsageError
from dfkd.evaluation.sources import READERS, Source
from dfkd.files import replace_text
from dfkd.synthesis.sampler import smoothed

SIZE = 32
NAMES, MADE = "batches.meta.txt", "made.json"
ROWS = 5000  # images that are shifted at a time


def grey(images: Tensor) -> Tensor:
    """Luma (ITU-R BT.601) of images [N, 3, H, W]: [N, 1, H, W]."""
    return (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def blurred(images: Tensor) -> Tensor:
    """Grey images under a Gaussian of one pixel."""
    return smoothed(grey(images), 1.0)


def sketched(images: Tensor) -> Tensor:
    """Dark edges on white: Sobel's magnitude of the grey image, divided by its own 98th percentile, inverted."""
    across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    kernels = torch.stack([across, across.T])[:, None]
    edges = F.conv2d(F.pad(grey(images), (1, 1, 1, 1), "reflect"), kernels).norm(dim=1, keepdim=True)
    strong = torch.quantile(edges.flatten(1), 0.98, 1)[:, None, None, None]
    return 1 - (edges / strong.clamp_min(1e-6)).clamp(0, 1)


# What the teacher's images are beside those of the prior: float [N, 3, H, W] in 0..1 -> the same, or one channel.
SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda images: images,
    "grey-blur": blurred,
    "sketch": sketched,
}


def shifted(images: Tensor, shift: str) -> Tensor:
    """Images uint8 [N, 3, H, W] as a teacher of that world sees them."""
    parts = [SHIFTS[shift](part.float() / 255).expand(-1, 3, -1, -1) for part in torch.split(images, ROWS)]
    return (torch.cat(parts) * 255).round().to(torch.uint8)


def read(data: str, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """All images uint8 [N, 3, 32, 32] of a split in the order of its files, labels int64 [N], and class names.

    data: a source of real images, such as "cifar:PATH". Raises UsageError: no such data, or no such split.
    """
    source = Source.of(data)
    source.check(split)
    if split not in source.places:
        todo = "give CIFAR-10 in its own files, or class folders in PATH/train and PATH/test"
        raise UsageError(f"--data {data} has no {split} images apart", f"it has {', '.join(source.places)}", todo)
    listing = READERS[source.kind][1](source.places[split])
    images = ImageFiles(listing.check(), SIZE)
    return images.read(torch.arange(len(images.labels))), images.labels, listing.class_names


def write(data: str, shift: str, out: Path) -> None:
    """OUT/teacher and OUT/prior, unless they are there. Raises UsageError as `read`, and for those of other images."""
    made, asked = out / MADE, json.dumps({"data": data, "shift": shift})
    if made.exists():
        if made.read_text() != asked:
            raise UsageError(f"{out} is made of {made.read_text()}", f"asked is {asked}", "choose another --out")
        return
    images, labels, names = read(data, "train")
    tests, answers, _ = read(data, "test")
    for folder, first, how in (("teacher", 0, shift), ("prior", 1, "none")):
        (out / folder).mkdir(parents=True, exist_ok=True)
        write_batch(out / folder / "data_batch_1.bin", shifted(images[first::2], how), labels[first::2])
        write_batch(out / folder / "test_batch.bin", shifted(tests, how), answers)
        replace_text(out / folder / NAMES, "\n".join(names) + "\n")
    replace_text(made, asked)


def write_batch(file: Path, images: Tensor, labels: Tensor) -> None:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N] as a .bin file of CIFAR-10."""
    rows = np.concatenate([labels.to(torch.uint8).numpy()[:, None], images.flatten(1).numpy()], 1)
    file.write_bytes(rows.tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10, such as cifar:PATH or parquet:PATH")
    parser.add_argument("--shift", choices=SHIFTS, default="none")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    write(a.data, a.shift, a.out)


if __name__ == "__main__":
    main()
