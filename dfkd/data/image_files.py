"""Labelled image files of a folder tree, a list file or Parquet files: list them, then decode them, all or some."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfkd.data.codec import decode
from dfkd.data.shards import BadSample
from dfkd.errors import UsageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


@dataclass(frozen=True)
class Listing:
    """images: a path or the encoded bytes of each image; labels in [0, len(class_names)), same length.

    Raises UsageError for two classes of one name.
    """

    images: Sequence[Path | bytes]
    labels: Sequence[int]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if twice := sorted({name for name in self.class_names if self.class_names.count(name) > 1}):
            raise UsageError(f"several classes are named {', '.join(twice)}", "names tell classes apart", "rename them")

    def take(self, indices: NDArray[np.int64]) -> "Listing":
        return Listing([self.images[i] for i in indices], [self.labels[i] for i in indices], self.class_names)


class ImageFiles:
    """A listing's images, size x size, read and decoded when they are asked for.

    files: "fitted", or "sized" where every file is known to be size x size. ids: places in the listing unless given.
    left_out: damaged images that the listing does without. digest: of the files' bytes and the labels, read once.
    """

    def __init__(
        self,
        listing: Listing,
        size: int,
        files: str = "fitted",
        ids: Tensor | None = None,
        left_out: Sequence[BadSample] = (),
        digest: str = "",
    ) -> None:
        self.listing, self.image_size, self.files, self.left_out = listing, size, files, tuple(left_out)
        self.class_names, self.labels = listing.class_names, torch.tensor(listing.labels, dtype=torch.int64)
        self.ids = torch.arange(len(self.labels)) if ids is None else ids
        if digest:
            self.digest = digest

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256(self.labels.numpy().data)
        for source in self.listing.images:
            digest.update(hashlib.sha256(_bytes(source)).digest())
        return digest.hexdigest()

    def read(self, positions: Tensor) -> Tensor:
        """uint8 [n, 3, size, size] at int64 [n] positions; raises UsageError naming a file that cannot be read."""
        images = np.empty((len(positions), self.image_size, self.image_size, 3), np.uint8)
        for row, position in enumerate(positions.tolist()):
            source = self.listing.images[position]
            try:
                images[row] = decode(_bytes(source), size=self.image_size)
            except (OSError, ValueError) as error:
                name = "an image in the Parquet file" if isinstance(source, bytes) else str(source)
                raise UsageError(f"cannot read {name}", str(error)) from error
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def encoded(self, positions: Tensor) -> list[NDArray[np.uint8]]:
        """The files' bytes at int64 [n] positions; raises UsageError naming one that cannot be read."""
        return [np.frombuffer(_bytes(self.listing.images[i]), np.uint8) for i in positions.tolist()]

    def fitted(self, size: int) -> "ImageFiles":
        """A view of the listing in another size: each image is made from its file in one step."""
        return ImageFiles(self.listing, size, "fitted", self.ids, self.left_out, self.digest)


def list_folder(root: Path, complete: bool = True) -> Listing:
    """Images root/<class>/<image>, classes in the order of root/classes.json if there is one, else sorted by name,
    numbers by value (10 after 9).

    classes.json: a list of names, or {name: label}. Folders that begin with a dot, and __MACOSX, are no classes.
    complete: refuse classes without an image. Raises UsageError, naming them; for folders that classes.json lacks, and
    where there is no image at all.
    """
    if not root.is_dir():
        raise UsageError(f"no folder {root}", todo="give a folder that holds one folder of images per class")
    folders = [entry.name for entry in root.iterdir() if entry.is_dir() and not _hidden(entry)]
    ordered = root / "classes.json"
    names = _read_order(ordered) if ordered.exists() else sorted(folders, key=_natural)
    if unknown := sorted(set(folders) - set(names)):
        why = f"but there are folders {', '.join(unknown)}"
        raise UsageError(f"{ordered} names {', '.join(names)}", why, "make them agree")
    images: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        files = sorted((root / name).iterdir()) if name in folders else []
        images += (found := [file for file in files if file.suffix.lower() in SUFFIXES and not _hidden(file)])
        labels += [label] * len(found)
    if not images:
        raise UsageError(f"no image in {root}", f"wanted are {root}/CLASS/IMAGE.png (or {', '.join(sorted(SUFFIXES))})")
    if complete and (empty := [names[label] for label in sorted(set(range(len(names))) - set(labels))]):
        why = "every folder in it is a class"
        raise UsageError(f"{root} has no image of {', '.join(empty)}", why, "add images, or move those folders out")
    return Listing(images, labels, tuple(names))


def list_file(file: Path) -> Listing:
    """Lines `path label`. Classes are named after the folders of their images where each has one for itself, else
    by number. Raises UsageError for a line that is none."""
    if not file.is_file():
        raise UsageError(f"no list file {file}", todo="give a text file of lines `path label`")
    images: list[Path] = []
    labels: list[int] = []
    folders: dict[int, set[str]] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is no list of images", str(error), "give a text file of lines `path label`") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal():
            raise UsageError(f"{file}, line {number}: '{line}'", "a line is `path label`, the label a number from 0")
        images.append(file.parent / path)
        labels.append(int(label))
        folders.setdefault(int(label), set()).add(Path(path).parent.name)
    numbers = range(max(labels, default=-1) + 1)
    names = [_only(folders.get(label, set())) or str(label) for label in numbers]
    if len(set(names)) < len(names):  # several classes lie in one folder
        names = [str(label) for label in numbers]
    return Listing(images, labels, tuple(names))


def list_parquet(path: Path) -> Listing:
    """One Parquet file, or all in a folder by name, in the Hugging Face image layout (image{bytes, path}, label).

    Class names come from the Hugging Face schema, else are numbers. Raises UsageError: no file, no such columns, or
    pyarrow is not installed.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError(f"cannot read {path}", "pyarrow is not installed", "pip install pyarrow") from error
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UsageError(f"no Parquet file at {path}", todo="give a .parquet file or a folder that holds some")
    images: list[bytes] = []
    labels: list[int] = []
    names: list[str] = []
    for file in files:
        try:
            table = parquet.read_table(file)
        except (OSError, ValueError) as error:
            raise UsageError(f"{file} is no Parquet file", str(error).partition("\n")[0]) from None
        missing = {"image", "label"} - set(table.column_names)
        if missing:
            raise UsageError(f"{file} has no column {sorted(missing)[0]}", "wanted: image{bytes, path} and label")
        names = names or _schema_names(table.schema.metadata or {})
        images += [row["bytes"] for row in table.column("image").to_pylist()]
        labels += table.column("label").to_pylist()
    return Listing(images, labels, tuple(names or [str(label) for label in range(max(labels, default=-1) + 1)]))


def _bytes(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {source}", error.strerror or str(error)) from error


def _read_order(file: Path) -> list[str]:
    """Class names in the order of their labels, from a JSON list or {name: label}."""
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
        return [str(name) for name in (sorted(listed, key=listed.__getitem__) if isinstance(listed, dict) else listed)]
    except (ValueError, TypeError) as error:
        raise UsageError(f"{file} cannot be read", str(error), "wanted is a list of class names") from None


def _schema_names(metadata: dict[bytes, bytes]) -> list[str]:
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return list(features.get("label", {}).get("names", []))


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__MACOSX"


def _natural(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isdigit() else (1, 0, name)


def _only(names: set[str]) -> str:
    return next(iter(names)) if len(names) == 1 else ""
