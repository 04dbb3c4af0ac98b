"""Labelled image files: a listing of them by class, and their pixels, read when they are asked for."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dfkd.data.codec import decode, encode, probe
from dfkd.data.shards import BadSample
from dfkd.errors import UsageError
from dfkd.rgb import square

Source = Path | bytes | NDArray[np.uint8]
NAMED = 3  # files that a message names at most


@dataclass(frozen=True)
class Listing:
    """Images and their classes, before any is decoded.

    images: a path, encoded bytes, or pixels uint8 [H, W] or [H, W, 3] each. labels: in [0, len(class_names)), as many.
    class_names: unique; "" for a number that no image has, see `compact`. numbered: they are the labels' numbers, for
    want of names. place: where the images are, for people. passed_over: files that are not read, by suffix.

    Raises UsageError for two classes of one name.
    """

    images: Sequence[Source]
    labels: Sequence[int]
    class_names: tuple[str, ...]
    numbered: bool = False
    place: str = field(default="", compare=False)
    passed_over: Mapping[str, int] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        names = [name for name in self.class_names if name]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise UsageError(f"several classes are named {', '.join(twice)}", "names tell classes apart", "rename them")

    def take(self, indices: NDArray[np.int64]) -> "Listing":
        """Some of the images, of the same classes."""
        images, labels = [self.images[i] for i in indices], [self.labels[i] for i in indices]
        return replace(self, images=images, labels=labels)

    def compact(self) -> "Listing":
        """A copy whose classes are those with a name: numbers that no image has are left out."""
        return self.only([name for name in self.class_names if name])

    def only(self, class_names: Sequence[str]) -> "Listing":
        """The images of these classes, which are numbered in this order."""
        places = {name: place for place, name in enumerate(class_names)}
        new = [places.get(name, -1) if name else -1 for name in self.class_names]
        if new == list(range(len(class_names))):
            return self
        kept = [i for i, label in enumerate(self.labels) if new[label] >= 0]
        images, labels = [self.images[i] for i in kept], [new[self.labels[i]] for i in kept]
        return replace(self, images=images, labels=labels, class_names=tuple(class_names))

    def ordered(self, class_names: Sequence[str], whose: str) -> "Listing":
        """A copy with labels in the order of `class_names`, matched by name.

        Raises UsageError for images of other classes, which those of `whose` are not.
        """
        known = set(class_names)
        if unknown := [name for name in self.occurring() if name not in known]:
            what = f"{self.place} has images of {some_names(unknown)}"
            why = f"the classes of {whose} are {some_names(class_names)}"
            todo = "classes go by name: rename those folders or take them out; classes.json names those of idx files"
            raise UsageError(what, why, todo)
        return self.only(class_names)

    def occurring(self) -> list[str]:
        """Names of the classes that have images, in their order."""
        return [self.class_names[label] for label in sorted(set(self.labels))]

    def lacking(self) -> list[str]:
        """Names of the classes without an image."""
        has = set(self.labels)
        return [name for label, name in enumerate(self.class_names) if name and label not in has]

    def name_of(self, position: int) -> str:
        """What a message calls an image."""
        source = self.images[position]
        return str(source) if isinstance(source, Path) else f"image {position} of {self.place or 'the data'}"

    @cached_property
    def plain(self) -> NDArray[np.bool_]:
        """Whether every decoder makes the same pixels of a file (dfkd.data.codec.is_plain), bool [N].

        Looks at each file once (dfkd.data.codec.probe). Raises UsageError for files that are absent, no images, cut off
        or larger than Pillow decodes: how many, and the first by name.
        """
        sources = self.images
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # which wait for disks beside one another
            parts = [sources[start : start + 256] for start in range(0, len(sources), 256)]
            found = [
                one for part in threads.map(lambda part: [_probe(source) for source in part], parts) for one in part
            ]
        bad = [(position, words) for position, words in enumerate(found) if isinstance(words, str)]
        if bad:
            shown = "; ".join(f"{self.name_of(position)}: {words}" for position, words in bad[:NAMED])
            more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
            what = f"{len(bad)} of {len(sources)} images cannot be read"
            raise UsageError(what, shown + more, "mend them or take them out")
        return np.array(found, bool)

    def check(self) -> "Listing":
        """Itself, once every file was looked at; raises UsageError as `plain` does."""
        assert len(self.plain) == len(self.images)
        return self

    def described(self) -> str:
        """One line for people: how many images of how many classes are where, and what was not read."""
        skipped = ", ".join(f"{count} {suffix}" for suffix, count in sorted(self.passed_over.items()))
        more = f" (not read there: {skipped})" if skipped else ""
        empty = f", none of {some_names(self.lacking())}" if self.lacking() else ""
        classes = len(self.class_names)
        return f"{len(self.images)} images of {classes} classes in {self.place or 'memory'}{more}{empty}"


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
            images[row] = self._pixels(position, self.image_size)
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def encoded(self, positions: Tensor) -> list[NDArray[np.uint8]]:
        """Bytes, at int64 [n] positions, of which every decoder makes the pixels that read() begins with.

        They are the files' own where is_plain says so, and else a PNG made here of what Pillow reads. Raises UsageError
        naming a file that cannot be read.
        """
        return [np.frombuffer(self._encoded(position), np.uint8) for position in positions.tolist()]

    def fitted(self, size: int) -> "ImageFiles":
        """A view of the listing in another size: each image is made from its file in one step."""
        return ImageFiles(self.listing, size, "fitted", self.ids, self.left_out, self.__dict__.get("digest", ""))

    def _encoded(self, position: int) -> bytes:
        if self.listing.plain[position]:
            return _bytes(self.listing.images[position])
        return encode(self._pixels(position), "png")

    def _pixels(self, position: int, size: int | None = None) -> NDArray[np.uint8]:
        source = self.listing.images[position]
        try:
            if isinstance(source, np.ndarray):
                return square(Image.fromarray(source), size)
            return decode(_bytes(source), size=size)
        except (OSError, ValueError) as error:
            what = f"cannot read {self.listing.name_of(position)}"
            raise UsageError(what, str(error), "mend it or take it out") from error


def some_names(names: Sequence[str]) -> str:
    """The first ten of them, and how many there are."""
    return ", ".join(names[:10]) + (f", ... ({len(names)})" if len(names) > 10 else "")


def _probe(source: Source) -> bool | str:
    """Whether an image is plain, or what is wrong with it."""
    if isinstance(source, np.ndarray):
        return False
    try:
        return probe(source)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)


def _bytes(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, np.ndarray):
        return source.tobytes()
    try:
        return source.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {source}", error.strerror or str(error)) from error
