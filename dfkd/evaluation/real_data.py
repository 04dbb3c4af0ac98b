"""Labelled real images: what a teacher is trained on, and what a student is tested on once, at the end.

Synthesis and distillation never import this module; the only road from real data to a student is the frozen teacher.

Sources, by name:
    digits-on-photos    the demo's world, see digits_on_photos.py
    imagefolder:PATH    PATH/<class>/<image>; a PATH alone is read so where it is a folder
    list:FILE           lines `path label` (DomainNet's list files), paths relative to FILE's folder
    parquet:PATH        a Parquet file or a folder of them in the Hugging Face image layout (image{bytes, path}, label)
A path may hold `{split}`, as in `list:sketch_{split}.txt`: one file or folder per split. Where there is none for
`validation`, a tenth of `train` is held out for it. A path without `{split}` is cut 70 / 10 / 20 by class; the split
`all` takes every image of it.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dfkd.data import ImageFiles, Images, Listing, Pool, list_file, list_folder, list_parquet
from dfkd.errors import UsageError
from dfkd.evaluation.digits_on_photos import CLASS_NAMES, digits_on_photos
from dfkd.evaluation.split import SPLITS, stratified

DIGITS = "digits-on-photos"
READERS: dict[str, Callable[[Path], Listing]] = {"imagefolder": list_folder, "list": list_file, "parquet": list_parquet}


def open_images(name: str, split: str, size: int) -> Images:
    """The images of one split, the same ones in the same order at every call; files are decoded when they are read.

    split: train, validation, test or, for a path without {split}, all.
    size: side in pixels; the shorter side is resized to it (bicubic, antialiased) and the centre cut out.
    Raises UsageError for an unknown name or split and a missing file.
    """
    if split not in (*SPLITS, "all"):
        raise UsageError(f"unknown split '{split}'", todo=f"choose one of {', '.join(SPLITS)}, all")
    if name == DIGITS:
        return _digits(split, size)
    kind, _, path = name.partition(":")
    if not path and Path(name).is_dir():
        kind, path = "imagefolder", name
    if kind not in READERS or not path:
        known = ", ".join([DIGITS, *(f"{kind}:PATH" for kind in READERS)])
        raise UsageError(f"unknown data '{name}'", todo=f"choose one of {known}")
    listing = _listing(READERS[kind], path, split)
    if not listing.images:
        raise UsageError(f"no image for split '{split}' in '{name}'", todo="check the path and the number of images")
    return ImageFiles(listing, size)


def check_data(option: str, name: str, split: str = "train") -> None:
    """Raise UsageError for a data set whose name, path or split is wrong, without reading any; `option` names it."""
    kind, _, path = name.partition(":")
    if name != DIGITS and not Path(name).is_dir() and not (kind in READERS and path):
        known = ", ".join([DIGITS, *(f"{kind}:PATH" for kind in READERS)])
        raise UsageError(f"{option} {name}", "there is no such data", f"choose one of {known}")
    if split == "all" and (name == DIGITS or "{split}" in path):
        raise UsageError(f"{option} {name}", "it has no split 'all'", f"choose one of {', '.join(SPLITS)}")
    parts = ("validation", "train") if split == "validation" else (split,)  # it may be held out of `train`
    files = [path.replace("{split}", part) for part in parts]
    if path and not any(Path(file).exists() for file in files):
        raise UsageError(f"{option} {name}", f"there is no {files[-1]}", "correct the path")


def class_names_of(name: str) -> tuple[str, ...]:
    """The classes of a data set, without decoding an image; () where they cannot be known without reading all of it."""
    if name == DIGITS:
        return CLASS_NAMES
    return () if name.startswith("parquet:") else open_images(name, "train", 1).class_names


def _digits(split: str, size: int) -> Pool:
    if split == "all":
        raise UsageError(f"{DIGITS} has no split 'all'", todo=f"choose one of {', '.join(SPLITS)}")
    pixels, labels, class_names = digits_on_photos(split)
    images = torch.from_numpy(pixels)
    if size != images.shape[-1]:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    return Pool(images, torch.from_numpy(labels), torch.arange(len(labels)), class_names)


def _listing(read: Callable[[Path], Listing], pattern: str, split: str) -> Listing:
    if "{split}" not in pattern:
        whole = read(Path(pattern))
        return whole if split == "all" else whole.take(stratified(np.asarray(whole.labels), (0.7, 0.1, 0.2))[split])
    if split == "all":
        raise UsageError("split 'all'", f"{pattern} has a file or folder for each split", "choose one of them")
    own = Path(pattern.replace("{split}", split))
    if split == "test" or (split == "validation" and own.exists()):
        return read(own)
    train = read(Path(pattern.replace("{split}", "train")))
    if Path(pattern.replace("{split}", "validation")).exists():
        return train
    return train.take(stratified(np.asarray(train.labels), (0.9, 0.1, 0.0))[split])
