"""Labelled real images: what a teacher is trained on, and what a student is tested on once, at the end.

Synthesis and distillation never import this module; the only road from real data to a student is the frozen teacher.

Sources, by name:
    digits-on-photos    the demo's world, see digits_on_photos.py
    imagefolder:PATH    PATH/<class>/<image>
    list:FILE           lines `path label` (DomainNet's list files), paths relative to FILE's folder
    parquet:PATH        a Parquet file or a folder of them in the Hugging Face image layout (image{bytes, path}, label)
A path may hold `{split}`, as in `list:sketch_{split}.txt`: one file or folder per split. Where there is none for
`validation`, a tenth of `train` is held out for it. A path without `{split}` is cut 70 / 10 / 20 by class.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dfkd.errors import UsageError
from dfkd.evaluation.digits_on_photos import digits_on_photos
from dfkd.data.image_files import ImageFiles, Listing, decode, read_folder, read_list, read_parquet
from dfkd.evaluation.split import SPLITS, stratified
from dfkd.data.loader import Images
from dfkd.data.shards import Pool

READERS: dict[str, Callable[[Path], Listing]] = {"imagefolder": read_folder, "list": read_list, "parquet": read_parquet}


@dataclass(frozen=True)
class LabelledImages:
    """images uint8 [N, 3, H, W]; labels int64 [N] in [0, len(class_names)); class_names in label order."""

    images: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]


def open_images(name: str, split: str, size: int) -> Images:
    """The images of one split, the same ones in the same order at every call; files are decoded when they are read.

    size: side in pixels; the shorter side is resized to it (bicubic, antialiased) and the centre cut out.
    Raises UsageError for an unknown name or split and a missing file.
    """
    _check_split(split)
    if name == "digits-on-photos":
        drawn = load(name, split, size)
        return Pool(drawn.images, drawn.labels, torch.arange(len(drawn.labels)), drawn.class_names)
    return ImageFiles(_listed(name, split), size)


def load(name: str, split: str, size: int | None = None) -> LabelledImages:
    """As open_images, all in memory. size None keeps images as they are.

    Raises UsageError, also for images of different sizes with size=None.
    """
    _check_split(split)
    if name == "digits-on-photos":
        pixels, labels, class_names = digits_on_photos(split)
        images = torch.from_numpy(pixels)
        if size not in (None, images.shape[-1]):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        return LabelledImages(images, torch.from_numpy(labels), class_names)
    listing = _listed(name, split)
    images = torch.from_numpy(decode(listing.images, size))
    return LabelledImages(images, torch.tensor(listing.labels), listing.class_names)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UsageError(f"unknown split '{split}'", todo=f"choose one of {', '.join(SPLITS)}")


def _listed(name: str, split: str) -> Listing:
    kind, _, path = name.partition(":")
    if kind not in READERS or not path:
        known = ", ".join(["digits-on-photos", *(f"{kind}:PATH" for kind in READERS)])
        raise UsageError(f"unknown data '{name}'", todo=f"choose one of {known}")
    listing = _listing(READERS[kind], path, split)
    if not listing.images:
        raise UsageError(f"no image for split '{split}' in '{name}'", todo="check the path and the number of images")
    return listing


def _listing(read: Callable[[Path], Listing], pattern: str, split: str) -> Listing:
    if "{split}" not in pattern:
        whole = read(Path(pattern))
        return whole.take(stratified(np.asarray(whole.labels), (0.7, 0.1, 0.2))[split])
    own = Path(pattern.replace("{split}", split))
    if split == "test" or (split == "validation" and own.exists()):
        return read(own)
    train = read(Path(pattern.replace("{split}", "train")))
    if Path(pattern.replace("{split}", "validation")).exists():
        return train
    return train.take(stratified(np.asarray(train.labels), (0.9, 0.1, 0.0))[split])
