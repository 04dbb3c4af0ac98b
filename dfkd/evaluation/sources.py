"""Where the splits of a named data set are: `imagefolder:photos/{split}`, `parquet:FOLDER`, `list:FILE?classes=a,b`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from dfkd.config.lists import names_in
from dfkd.config.words import nearest
from dfkd.data import Listing, list_file, list_folder, list_parquet
from dfkd.data.array_files import cifar_files, idx_files, list_cifar, list_idx
from dfkd.data.class_folders import class_folders
from dfkd.data.parquet_files import parquet_names
from dfkd.errors import UsageError
from dfkd.evaluation.split import stratified

DIGITS = "digits-on-photos"
WHOLE = "all"
# What folders and files of a split are called; "test" is also what validation images are used for where there is none.
NAMES = {"train": ("train", "training"), "validation": ("validation", "val", "valid"), "test": ("test",)}
HOLDS = {"imagefolder": "class folders", "list": "lines", "parquet": "Parquet files"}  # what is found at a PATH
HOLDS |= {"cifar": "batches of CIFAR", "mnist": "idx files of MNIST"}
Places = dict[str, list[Path]]


@dataclass(frozen=True)
class Source:
    """A data set by name: KIND:PATH, and `?classes=A,B` or `?classes=@FILE` (dfkd.config.lists) for some classes."""

    kind: str
    path: str
    classes: tuple[str, ...] = ()
    name: str = field(default="", compare=False)
    _found: dict[str, Listing] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, name: str) -> Self:
        """Raises UsageError for an unknown kind and a wrong choice of classes."""
        own, _, chosen = name.partition("?")
        kind, _, path = own.partition(":")
        if not path and Path(own).is_dir():
            kind, path = "imagefolder", own
        if kind not in READERS or not path:
            raise UsageError(f"unknown data '{name}'", "there is no such data", f"choose one of {', '.join(known())}")
        return cls(kind, path, _chosen(name, chosen), name)

    def same(self, other: str) -> bool:
        """Whether another name means the same images."""
        try:
            own, that = (replace(source, path=str(Path(source.path).resolve())) for source in (self, Source.of(other)))
        except UsageError:
            return False
        return own == that

    @cached_property
    def places(self) -> Places:
        """The files or the folder of each split, or of WHOLE where PATH is one set; raises UsageError where there are
        none. Validation images are the test where no labelled test images are."""
        found = READERS[self.kind][0](self.path)
        if not found:
            what = self.path.replace("{split}", "train") if "{split}" in self.path else self.path
            why = f"{what} holds no {HOLDS[self.kind]}" if Path(what).exists() else f"there is no {what}"
            raise UsageError(f"no data '{self.name}'", why, "correct the path")
        if "validation" in found and "test" not in found:
            found["test"] = found.pop("validation")
        return found

    def check(self, split: str) -> None:
        """Raise UsageError where there is no such split; reads no image."""
        places = self.places
        if split == WHOLE and WHOLE not in places:
            why = f"it has no split '{WHOLE}' but {', '.join(places)}"
            raise UsageError(f"'{self.name}'", why, "choose one of them")
        needed = "train" if split == "validation" and split not in places else split  # held out of it
        if WHOLE not in places and needed not in places:
            missing = self.path.replace("{split}", needed) if "{split}" in self.path else f"{needed} in {self.path}"
            raise UsageError(f"no images for split '{split}' in '{self.name}'", f"there is no {missing}", "add it")

    def listing(self, split: str) -> Listing:
        """The images of a split: train, validation, test or, of a PATH that is one set, all; that is cut 70/10/20 by
        class. Without validation images a tenth of train is held out. Raises UsageError."""
        self.check(split)
        if WHOLE in self.places:
            whole = self._chosen(self._read(WHOLE))
            return whole if split == WHOLE else self._cut(whole, split, (0.7, 0.1, 0.2))
        if split == "test" or (split == "validation" and split in self.places):
            return self._chosen(self._read(split))
        train = self._chosen(self._read("train"))
        return train if "validation" in self.places else self._cut(train, split, (0.9, 0.1, 0.0))

    def class_names(self) -> tuple[str, ...]:
        """The classes to learn, without decoding an image; () where only reading all images could tell."""
        place = self.places.get("train") or self.places.get(WHOLE) or next(iter(self.places.values()))
        if self.kind != "parquet":
            return self.listing("train" if {"train", WHOLE} & self.places.keys() else "test").class_names
        return self.classes or parquet_names(place)

    def _read(self, part: str) -> Listing:
        """All images of a part; numbers that stand for classes are named as those of the training images are."""
        found = self._numbers(part)
        if found.numbered and part != "train" and "train" in self.places:
            names = self._numbers("train").class_names
            named = [names[i] if i < len(names) and names[i] else name for i, name in enumerate(found.class_names)]
            found = replace(found, class_names=tuple(named), numbered=False)
        return found.compact()

    def _numbers(self, part: str) -> Listing:
        """All images of a part with the labels of its files, read once."""
        if part not in self._found:
            self._found[part] = READERS[self.kind][1](self.places[part])
        return self._found[part]

    def _chosen(self, found: Listing) -> Listing:
        if not self.classes:
            return found
        known = found.class_names
        if "train" in self.places and self.kind != "parquet":  # a test may lack some; Parquet's schema has all
            known = self._read("train").class_names
        if unknown := [name for name in self.classes if name not in known]:
            raise UsageError(f"'{self.name}' has no class '{unknown[0]}'", nearest(unknown[0], known))
        return found.only(self.classes)

    def _cut(self, whole: Listing, split: str, shares: tuple[float, float, float]) -> Listing:
        part = whole.take(stratified(np.asarray(whole.labels), shares)[split])
        return replace(part, place=f"{whole.place} ({split}: {len(part.images)} of {len(whole.images)})")


def known() -> list[str]:
    """Forms of a data set's name."""
    return [DIGITS, *(f"{kind}:PATH" for kind in READERS)]


def classes_in(name: str) -> tuple[str, ...]:
    """The classes that a name chooses, () where it chooses none. Raises UsageError."""
    return _chosen(name, name.partition("?")[2])


def _chosen(name: str, words: str) -> tuple[str, ...]:
    if not words:
        return ()
    key, _, value = words.partition("=")
    if key != "classes" or not value:
        raise UsageError(
            f"unknown data '{name}'", f"'?{words}' chooses nothing", "write ?classes=A,B or ?classes=@FILE"
        )
    if value.startswith("@"):
        try:
            return names_in(value[1:])
        except ValueError as error:
            raise UsageError(f"unknown data '{name}'", str(error)) from None
    return tuple(value.split(","))


def _folders(path: str) -> Places:
    if "{split}" in path:
        return _labelled(_by_split(path))
    if not Path(path).is_dir():
        return {}
    inner = _by_split(f"{path}/{{split}}")
    if "train" in inner and (len(inner) > 1 or len(class_folders(inner["train"][0])) > 1):  # else it is a class
        return _labelled(inner)
    return {WHOLE: [Path(path)]}


def _labelled(found: Places) -> Places:
    """Without test images in no class folder, or all in one named images: the answers to those are hidden."""
    hidden = "test" in found and found["test"][0].is_dir() and class_folders(found["test"][0]) in ([], ["images"])
    return {split: files for split, files in found.items() if split != "test" or not hidden}


def _lists(path: str) -> Places:
    return _by_split(path) if "{split}" in path else {WHOLE: [Path(path)]} if Path(path).is_file() else {}


def _parquets(path: str) -> Places:
    if "{split}" in path:
        return {split: _inside(files) for split, files in _by_split(path).items()}
    for folder in (Path(path), Path(path) / "data") if Path(path).is_dir() else ():
        found = {
            split: [file for name in names for file in sorted(folder.glob(f"{name}[-_.]*parquet"))]
            for split, names in NAMES.items()
        }
        if found["train"]:
            return {split: files for split, files in found.items() if files}
        if whole := sorted(folder.glob("*.parquet")):
            return {WHOLE: whole}
    if Path(path).is_file():
        return {WHOLE: [Path(path)]}
    return {split: files for split, place in _by_split(f"{path}/{{split}}").items() if (files := _inside(place))}


def _inside(files: list[Path]) -> list[Path]:
    return [inner for file in files for inner in (sorted(file.glob("*.parquet")) if file.is_dir() else [file])]


def _by_split(pattern: str) -> Places:
    """What stands for {split} in a pattern, by its names; the rest may hold *."""
    found: Places = {}
    for split, names in NAMES.items():
        for name in names:
            path = Path(pattern.replace("{split}", name))
            files = sorted(path.parent.glob(path.name)) if "*" in path.name else [path] if path.exists() else []
            if files and split not in found:
                found[split] = files
    return found


# Kind -> what finds the files of each split, and what reads those of one.
READERS: dict[str, tuple[Callable[[str], Places], Callable[[Sequence[Path]], Listing]]] = {
    "imagefolder": (_folders, lambda files: list_folder(files[0], complete=False)),
    "list": (_lists, lambda files: list_file(files[0])),
    "parquet": (_parquets, list_parquet),
    "cifar": (lambda path: dict(cifar_files(Path(path))), list_cifar),
    "mnist": (lambda path: dict(idx_files(Path(path))), list_idx),
}
