"""Labelled image files of a folder tree, a list file or Parquet files: list them, then decode them, all or some."""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dfkd.errors import UsageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


@dataclass(frozen=True)
class Listing:
    """images: a path or the encoded bytes of each image; labels in [0, len(class_names)), same length."""

    images: list[Path | bytes]
    labels: list[int]
    class_names: tuple[str, ...]

    def take(self, indices: NDArray[np.int64]) -> "Listing":
        return Listing([self.images[i] for i in indices], [self.labels[i] for i in indices], self.class_names)


class ImageFiles:
    """A listing's images, size x size, read and decoded when they are asked for: dfkd.data.loader's Images and Encoded.

    Their ids are their places in the listing; the digest is that of the files' bytes and the labels, read once.
    """

    image_format = ""  # they may be of several, and of any size

    def __init__(self, listing: Listing, size: int) -> None:
        self.image_size, self.class_names = size, listing.class_names
        self.labels, self.ids = torch.tensor(listing.labels), torch.arange(len(listing.labels))
        self._images = listing.images

    @property
    def digest(self) -> str:
        digest = hashlib.sha256(self.labels.numpy().data)
        for source in self._images:
            digest.update(hashlib.sha256(_bytes(source)).digest())
        return digest.hexdigest()

    def read(self, positions: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, size, size] at int64 [n] positions; raises UsageError naming a file that cannot be read."""
        return torch.from_numpy(decode([self._images[i] for i in positions.tolist()], self.image_size))

    def encoded(self, positions: torch.Tensor) -> list[NDArray[np.uint8]]:
        """The files' bytes; raises UsageError naming one that cannot be read."""
        return [np.frombuffer(_bytes(self._images[i]), np.uint8) for i in positions.tolist()]


def read_folder(root: Path) -> Listing:
    """root/<class>/<image>. Classes in the order of root/classes.json if there is one, else sorted by name,
    numbers by value (10 after 9)."""
    if not root.is_dir():
        raise UsageError(f"no folder {root}", todo="give a folder that holds one folder of images per class")
    names = sorted((folder.name for folder in root.iterdir() if folder.is_dir()), key=_natural)
    ordered = root / "classes.json"
    if ordered.exists():
        listed = json.loads(ordered.read_text())
        if sorted(listed) != sorted(names):
            raise UsageError(f"{ordered} names {listed}", f"the class folders are {names}", "make them agree")
        names = listed
    pairs = [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted((root / name).iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    return Listing([file for file, _ in pairs], [label for _, label in pairs], tuple(names))


def read_list(file: Path) -> Listing:
    """Lines `path label`. A class is named after the folder of its images where that is one folder, else by number."""
    if not file.is_file():
        raise UsageError(f"no list file {file}", todo="give a text file of lines `path label`")
    images: list[Path | bytes] = []
    labels: list[int] = []
    folders: dict[int, set[str]] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdigit():
            raise UsageError(f"{file}, line {number}: '{line}'", "a line is `path label`, the label a number from 0")
        images.append(file.parent / path)
        labels.append(int(label))
        folders.setdefault(int(label), set()).add(Path(path).parent.name)
    names = [_only(folders.get(label, set())) or str(label) for label in range(max(labels, default=-1) + 1)]
    return Listing(images, labels, tuple(names))


def read_parquet(path: Path) -> Listing:
    """One Parquet file, or all in a folder by name. Class names come from the Hugging Face schema, else are numbers."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError(f"cannot read {path}", "pyarrow is not installed", "pip install pyarrow") from error
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UsageError(f"no Parquet file at {path}", todo="give a .parquet file or a folder that holds some")
    images: list[Path | bytes] = []
    labels: list[int] = []
    names: list[str] = []
    for file in files:
        table = parquet.read_table(file)
        missing = {"image", "label"} - set(table.column_names)
        if missing:
            raise UsageError(f"{file} has no column {sorted(missing)[0]}", "wanted: image{bytes, path} and label")
        names = names or _schema_names(table.schema.metadata or {})
        images += [row["bytes"] for row in table.column("image").to_pylist()]
        labels += table.column("label").to_pylist()
    return Listing(images, labels, tuple(names or [str(label) for label in range(max(labels, default=-1) + 1)]))


def decode(images: list[Path | bytes], size: int | None) -> NDArray[np.uint8]:
    """uint8 [N, 3, H, W], RGB. size None: all images must have one size, else they become size x size."""
    first = _open(images[0], size)
    stack = np.empty((len(images), 3, *first.shape[:2]), np.uint8)
    for index, source in enumerate(images):
        pixels = _open(source, size)
        if pixels.shape != first.shape:
            raise UsageError(
                f"image {index} is {pixels.shape[1]}x{pixels.shape[0]} and image 0 {first.shape[1]}x{first.shape[0]}",
                "a batch holds images of one size",
                "give an image size",
            )
        stack[index] = pixels.transpose(2, 0, 1)
    return stack


def _bytes(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {source}", error.strerror or str(error)) from error


def _open(source: Path | bytes, size: int | None) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError) as error:  # the second for some damaged PNG files
        name = "an image in the Parquet file" if isinstance(source, bytes) else str(source)
        raise UsageError(f"cannot read {name}", str(error)) from error
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _schema_names(metadata: dict[bytes, bytes]) -> list[str]:
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return list(features.get("label", {}).get("names", []))


def _natural(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isdigit() else (1, 0, name)


def _only(names: set[str]) -> str:
    return next(iter(names)) if len(names) == 1 else ""
