"""Labelled real images: what a teacher is trained on, and what a student is tested on once, at the end.

Synthesis and distillation never import this module; the only road from real data to a student is the frozen teacher.

Sources, by name:
    digits-on-photos    the demo's world, see digits_on_photos.py
    imagefolder:PATH    PATH/<class>/<image>; a PATH alone is read so where it is a folder
    list:FILE           lines `path label` (DomainNet's list files), paths relative to FILE's folder
    parquet:PATH        a Parquet file or a folder of them in the Hugging Face image layout
    cifar:PATH          CIFAR-10 or CIFAR-100 as torchvision's pickles or .bin files
    mnist:PATH          MNIST, Fashion-MNIST and sets in their form (idx files, gzipped or not)
Behind a name, `?classes=A,B` or `?classes=@FILE` takes some of its classes, in that order.

PATH may hold `{split}`, as in `list:sketch_{split}.txt`: one file or folder per split (`val` and `valid` do as well);
a folder with train/ beside test/ or val/ is read as PATH/{split}, and so are the files train-* and test-* of Hugging
Face. Where there are no validation images, a tenth of `train` is held out; where there are no test images, those of
`val` are the test. Of a PATH without splits a test takes every image, and training cuts it 70 / 10 / 20 by class.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dfkd.config import TeacherConfig
from dfkd.data import ImageFiles, Images, Listing, Pool
from dfkd.errors import UsageError
from dfkd.evaluation.digits_on_photos import CLASS_NAMES, digits_on_photos
from dfkd.evaluation.sources import DIGITS, WHOLE, Source, classes_in
from dfkd.evaluation.split import SPLITS
from dfkd.files import read_object


def open_splits(name: str, size: int, splits: Sequence[str] = SPLITS, least_classes: int = 2) -> dict[str, Images]:
    """What a teacher or a prior learns from: some of train, validation and test, with the classes of train in order.

    Every file is looked at (its ends) and every list and Parquet file is read to its end; pixels are decoded when
    they are read. size: side in pixels; the shorter side is resized to it (bicubic, antialiased), the centre cut out.

    splits: those wanted, train first. least_classes: 2 for a teacher, which tells classes apart.
    Raises UsageError: a name or split that is not there, fewer classes, a class without images to learn from,
    images of classes that train has not, a split without images, a file that is no image.
    """
    if is_digits(name):
        return {split: _digits(split, size, classes_in(name)) for split in splits}
    source = Source.of(name)
    for split in splits:
        source.check(split)
    train = source.listing("train")
    if len(train.class_names) < least_classes:
        what = f"{train.place} has one class, {train.class_names[0]}"
        raise UsageError(what, "a teacher tells classes apart", "give the folder whose folders are the classes")
    if lacking := train.lacking():
        raise UsageError(f"no images to learn {', '.join(lacking)} from", train.described(), "add some or take it out")
    parts = {"train": train}
    for split in splits[1:]:
        parts[split] = source.listing(split).ordered(train.class_names, "the training images")
    return {split: _opened(listing, split, name, size) for split, listing in parts.items()}


def open_images(name: str, split: str, size: int) -> Images:
    """The images of one split as training cuts it, the same ones in the same order at every call.

    split: train, validation, test or, for a PATH without splits, all. size: as of open_splits.
    Raises UsageError for an unknown name or split, and files that are missing or no images.
    """
    if split not in (*SPLITS, WHOLE):
        raise UsageError(f"unknown split '{split}'", todo=f"choose one of {', '.join(SPLITS)}, {WHOLE}")
    if is_digits(name):
        return _digits(split, size, classes_in(name))
    return _opened(Source.of(name).listing(split), split, name, size)


def open_test(name: str, split: str, size: int, learned: Iterable[str] = ()) -> Images:
    """The images of a test: as open_images, but the split test of a PATH without splits is every image of it.

    learned: names of what the networks were trained on; where `name` is one of them, the test is the fifth that their
    training left out. Raises UsageError as open_images does.
    """
    if split == "test" and not is_digits(name):
        source = Source.of(name)
        if WHOLE in source.places and not any(source.same(other) for other in learned):
            split = WHOLE
    return open_images(name, split, size)


def learned_from(*checkpoints: str | Path | None) -> list[str]:
    """Names of the images that networks were trained on, as the folders of dfkd-train-teacher tell; of a student, those
    of its teacher (OUT/last and OUT/best of dfkd-distill, whose settings lie in OUT)."""
    found: list[Any] = []
    for path in (Path(given) for given in checkpoints if given and Path(given).exists()):
        folder = path if path.is_dir() else path.parent
        found.append(_entry(folder / "config.json", "data"))
        if (options := _entry(folder.parent / "settings.json", "options")) and folder.name in ("last", "best"):
            clients = [TeacherConfig.client(text)[0] for text in options.get("clients") or ()]
            found += learned_from(options.get("teacher_checkpoint"), *clients)
    return [name for name in found if isinstance(name, str)]


def _entry(file: Path, key: str) -> Any:
    return read_object(file, {"options": {}}, "give a folder that dfkd wrote").get(key) if file.is_file() else None


def check_data(option: str, name: str, split: str = "train") -> None:
    """Raise UsageError for a data set whose name, path or split is wrong, without reading any; `option` names it."""
    try:
        if not is_digits(name):
            Source.of(name).check(split)
        elif split == WHOLE:
            _digits(split, 32)
    except UsageError as error:
        raise UsageError(f"{option} {name}", error.why or error.what, error.todo) from None


def class_names_of(name: str) -> tuple[str, ...]:
    """The classes of a data set, without decoding an image; () where they cannot be known without reading all of it."""
    return (classes_in(name) or CLASS_NAMES) if is_digits(name) else Source.of(name).class_names()


def described(images: Images) -> str:
    """One line for people: how many images of how many classes, from where, and what was not read there."""
    if isinstance(images, ImageFiles):
        return images.listing.described()
    return f"{len(images.labels)} images of {len(images.class_names)} classes"


def _opened(listing: Listing, split: str, name: str, size: int) -> ImageFiles:
    if not listing.images:
        raise UsageError(f"no image for split '{split}' in '{name}'", todo="check the path and the number of images")
    return ImageFiles(listing.check(), size)


def is_digits(name: str) -> bool:
    """Whether the images are the demo's world, or some classes of it."""
    return name.partition("?")[0] == DIGITS


def same_data(first: str, second: str) -> bool:
    """Whether two names mean the same images."""
    return first == second or (not is_digits(first) and Source.of(first).same(second))


def _digits(split: str, size: int, only: Sequence[str] = ()) -> Pool:
    """only: of the classes, in that order; () for all."""
    if split == WHOLE:
        raise UsageError(f"{DIGITS} has no split '{WHOLE}'", todo=f"choose one of {', '.join(SPLITS)}")
    if unknown := [name for name in only if name not in CLASS_NAMES]:
        raise UsageError(f"{DIGITS} has no class {unknown[0]!r}", f"it has {', '.join(CLASS_NAMES)}")
    pixels, labels, class_names = digits_on_photos(split)
    images, numbers = torch.from_numpy(pixels), torch.from_numpy(labels)
    if only:
        places = torch.tensor([only.index(name) if name in only else -1 for name in class_names])
        rows = places[numbers] >= 0
        images, numbers, class_names = images[rows], places[numbers][rows], tuple(only)
    if size != images.shape[-1]:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    return Pool(images, numbers, torch.arange(len(numbers)), class_names)
