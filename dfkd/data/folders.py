"""Several folders of images as one: shards of dfkd-generate, and class folders that someone filtered or made."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfkd.data.batches import Images, resize
from dfkd.data.class_folders import list_folder
from dfkd.data.codec import decode
from dfkd.data.image_files import ImageFiles
from dfkd.data.shards import MANIFEST, BadSample, ShardPool, damage_text, open_folder
from dfkd.errors import UsageError

Folder = ShardPool | ImageFiles


class JoinedImages:
    """Images of several folders, one after the other, labelled in the order of ``class_names``.

    ids: a folder's own, moved past those of the folders before it. digest: tells all images, labels and classes.
    image_size: the folders' own where they agree and hold files of one size, else `size` (by default that of the first
    folder), to which all are brought. left_out: damaged images of all folders, which are not among these.
    """

    def __init__(self, parts: Sequence[Folder], class_names: tuple[str, ...], size: int | None = None) -> None:
        sized = [part.image_size for part in parts if part.files != "fitted"]
        if len(sized) < len(parts) or len(set(sized)) > 1:
            size = size or (sized or [parts[0].image_size])[0]
            parts = [part.fitted(size) if isinstance(part, ImageFiles) else part for part in parts]
        else:
            size = sized[0]
        self.parts, self.class_names, self.image_size = parts, class_names, size
        self.left_out = tuple(sample for part in parts for sample in part.left_out)
        decodable = all(part.files and part.image_size == size for part in parts)
        self.files = ("fitted" if any(part.files == "fitted" for part in parts) else "sized") if decodable else ""
        labels, ids, digest, past = [], [], hashlib.sha256(), 0
        for part in parts:
            places = torch.tensor([class_names.index(name) for name in part.class_names])
            labels.append(places[part.labels])
            ids.append(part.ids + past)
            past = int(ids[-1].max()) + 1
            digest.update(f"{part.digest} {places.tolist()} {size}\n".encode())
        self.labels, self.ids, self.digest = torch.cat(labels), torch.cat(ids), digest.hexdigest()
        self._ends = torch.tensor([len(part.ids) for part in parts]).cumsum(0)

    def read(self, positions: Tensor) -> Tensor:
        """uint8 [n, 3, H, W] at int64 [n] positions; raises UsageError naming the file of one that is damaged."""
        images = torch.empty(len(positions), self.image_size, self.image_size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        for part, rows, own in self._split(positions):
            images[rows] = resize(part.read(own), self.image_size)
        return images

    def encoded(self, positions: Tensor) -> list[NDArray[np.uint8]]:
        """Bytes of the image files at int64 [n] positions; raises UsageError naming one that cannot be read."""
        found: dict[int, NDArray[np.uint8]] = {}
        for part, rows, own in self._split(positions):
            found |= zip(rows.tolist(), part.encoded(own), strict=True)
        return [found[row] for row in range(len(positions))]

    def _split(self, positions: Tensor) -> list[tuple[Folder, Tensor, Tensor]]:
        """Folders that hold these positions: each with the rows of its images and their positions in it."""
        owner = torch.bucketize(positions, self._ends, right=True)
        split = []
        for index in sorted(set(owner.tolist())):
            rows = (owner == index).nonzero()[:, 0]
            before = int(self._ends[index - 1]) if index else 0
            split.append((self.parts[index], rows, positions[rows] - before))
        return split


def open_data(paths: Path | str | Sequence[Path | str], on_bad_sample: str = "fail") -> ShardPool | JoinedImages:
    """Images of one or several folders as one pool; each holds shards, or class folders (PATH/CLASS/IMAGE).

    Classes go by name, in the order of the first folder of shards, or else of the first folder. All folders of shards
    must have the same classes; class folders may lack some, but have no others.
    on_bad_sample: fail: raises UsageError for damaged images, naming file and id. skip: leaves them out; `left_out`
    tells which. Every image file is decoded once for that, and every shard's hash checked.
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    if not paths:
        raise UsageError("no folder of images is given", todo="give one or more with --data")
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise UsageError(f"--data {' '.join(map(str, paths))}", "a folder is given twice", "give each once")
    parts = [_open(Path(path), on_bad_sample) for path in paths]
    if len(parts) == 1 and isinstance(parts[0], ShardPool):
        return parts[0]
    leader = next((index for index, part in enumerate(parts) if isinstance(part, ShardPool)), 0)
    names = parts[leader].class_names
    for path, part in zip(paths, parts, strict=True):
        _check_classes(str(path), part.class_names, str(paths[leader]), names, isinstance(part, ImageFiles))
    return JoinedImages(parts, names)


def match_network(data: Images, class_names: tuple[str, ...], size: int) -> Images:
    """``data`` with labels in the order of ``class_names``, its files of various sizes fitted to size x size.

    Data that already matches, and images in memory, are returned unchanged. Raises UsageError where classes differ,
    naming them.
    """
    if not isinstance(data, ShardPool | JoinedImages):
        return data
    parts = data.parts if isinstance(data, JoinedImages) else [data]
    plain = all(isinstance(part, ImageFiles) for part in parts)
    _check_classes("the data", data.class_names, "the teacher", class_names, plain)
    if data.class_names == class_names and (isinstance(data, ShardPool) or data.image_size == size):
        return data
    return JoinedImages(parts, class_names, size)


def _open(path: Path, on_bad_sample: str) -> Folder:
    if (path / MANIFEST).exists():
        return open_folder(path, on_bad_sample)
    if any(path.glob("shard-*.tar")):
        raise UsageError(f"{path} holds shards without {MANIFEST}", "it tells their classes", "restore it")
    listing = list_folder(path, complete=False)
    files = [file for file in listing.images if isinstance(file, Path)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes outside of Python's lock
        checked = list(threads.map(_check, files))
    bad = [BadSample(files[i], i, found) for i, found in enumerate(checked) if isinstance(found, str)]
    if bad and (on_bad_sample == "fail" or len(bad) == len(files)):
        todo = "mend them, or leave them out with --on-bad-sample skip" if len(bad) < len(files) else "mend them"
        raise UsageError(f"{path} holds {len(bad)} damaged images of {len(files)}", damage_text(bad), todo)
    good = [(i, found) for i, found in enumerate(checked) if not isinstance(found, str)]
    kept = listing.take(np.array([i for i, _ in good]))
    digest = hashlib.sha256(str((listing.class_names, kept.labels)).encode())
    for _, (_, _, content) in good:
        digest.update(content)
    sides = {side for _, found in good for side in found[:2]}
    ids = torch.tensor([i for i, _ in good])
    return ImageFiles(kept, min(sides), "sized" if len(sides) == 1 else "fitted", ids, bad, digest.hexdigest())


def _check(file: Path) -> tuple[int, int, bytes] | str:
    """Height, width and hash of an image file, or what is wrong with it."""
    try:
        data = file.read_bytes()
        height, width, _ = decode(data).shape
    except (OSError, ValueError) as error:
        return str(error)
    return height, width, hashlib.sha256(data).digest()


def _check_classes(first: str, names: Sequence[str], other: str, wanted: Sequence[str], may_lack: bool) -> None:
    """Raise UsageError where `names`, of `first`, has classes beside those wanted, or (unless it may) lacks some."""
    unknown = [name for name in names if name not in set(wanted)]
    lacking = [] if may_lack else [name for name in wanted if name not in set(names)]
    if unknown or lacking:
        why = f"{other} has no {', '.join(unknown[:20])}" if unknown else f"{first} has no {', '.join(lacking[:20])}"
        todo = "give images of the same classes; classes.json beside class folders may name those"
        raise UsageError(f"{first} and {other} disagree about the classes", why, todo)
