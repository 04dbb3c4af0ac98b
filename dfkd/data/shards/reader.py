"""The reading side of a folder of shards: every image in memory, or each one when it is asked for."""

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dfkd.errors import UsageError
from dfkd.files import sha256
from dfkd.data.shards.codec import decode
from dfkd.data.shards.damage import BadSample, Entry, examine, in_words
from dfkd.data.shards.layout import Layout, Record, read_manifest, record_of

REPAIR = "run the same dfkd-generate again, which repairs it"


@dataclass(frozen=True)
class Pool:
    """Labelled images in memory.

    images uint8 [N, 3, H, W]; labels int64 [N] in [0, len(class_names)); ids int64 [N], unique; records in the same
    order, or none where the images did not come from a run; digest names the content (made from it where not given).
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    class_names: tuple[str, ...]
    records: tuple[Record, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""

    def __post_init__(self) -> None:
        if not self.digest:
            digest = hashlib.sha256()
            for tensor in (self.images, self.labels, self.ids):
                digest.update(tensor.cpu().contiguous().numpy().data)
            object.__setattr__(self, "digest", digest.hexdigest())

    @property
    def image_size(self) -> int:
        return self.images.shape[-1]

    def read(self, positions: Tensor) -> Tensor:
        """uint8 [n, 3, H, W] at int64 [n] positions."""
        return self.images[positions]


class ShardPool:
    """The images of a folder, decoded when read: as Pool, but only labels and ids are in memory.

    left_out: images of the folder that are damaged and not among these; the digest tells them too. It may be sent to
    other processes; each opens the files for itself.
    """

    def __init__(
        self,
        layout: Layout,
        entries: Sequence[Entry],
        labels: Tensor,
        ids: Tensor,
        digest: str,
        left_out: Sequence[BadSample] = (),
    ) -> None:
        self.layout, self.labels, self.ids, self.digest, self.left_out = layout, labels, ids, digest, left_out
        self.class_names, self.image_size, self.settings = layout.class_names, layout.image_size, layout.settings
        self.image_format = layout.image_format
        self._entries = entries

    def read(self, positions: Tensor) -> Tensor:
        """uint8 [n, 3, H, W] at int64 [n] positions; raises UsageError naming file and id of one that is damaged."""
        images = np.empty((len(positions), self.image_size, self.image_size, 3), np.uint8)
        for row, position in enumerate(positions.tolist()):
            with self._named(position):
                images[row] = decode(self._entries[position].read(), self.layout.image_format)
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def encoded(self, positions: Tensor) -> list[npt.NDArray[np.uint8]]:
        """The bytes of the images' files at int64 [n] positions; raises UsageError as read()."""
        found = []
        for position in positions.tolist():
            with self._named(position):
                found.append(np.frombuffer(self._entries[position].read(), np.uint8))
        return found

    @contextmanager
    def _named(self, position: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            what = f"{self._entries[position].file}: image {int(self.ids[position])} cannot be read"
            raise UsageError(what, str(error), REPAIR) from None


def open_folder(path: Path, on_bad_sample: str = "fail") -> ShardPool:
    """The index of a finished folder.

    on_bad_sample: fail: raises UsageError for a missing or altered shard, naming it and the images in it that are
    damaged. skip: those are left out, found by decoding the images of altered shards once; what is left does not
    depend on anything but the folder. Raises UsageError where nothing is.
    """
    if on_bad_sample == "fail":
        layout, found = scan(path)
        return _index(path, layout, [(entry, record.label, record.id) for entry, record in found])
    layout, shards = _finished(path)
    samples: list[tuple[Entry, Record]] = []
    left_out: list[BadSample] = []
    for index, shard in enumerate(shards):
        file = path / shard["file"]
        if file.is_file() and sha256(file) == shard["sha256"]:
            samples += _members(file, layout)
        else:
            good, bad = examine(file, layout.ids(index), layout)
            samples += good
            left_out += bad
    if not samples:
        raise UsageError(f"{path} holds no image that can be read", in_words(left_out, 1), REPAIR)
    return _index(path, layout, [(entry, record.label, record.id) for entry, record in samples], left_out)


def read_folder(path: Path) -> Pool:
    """All images and records of a finished folder; raises UsageError naming the file (and id) that is damaged."""
    layout, found = scan(path)
    samples = list(found)
    index = _index(path, layout, [(entry, record.label, record.id) for entry, record in samples])
    images = index.read(torch.arange(len(samples)))
    records = tuple(record for _, record in samples)
    return Pool(images, index.labels, index.ids, index.class_names, records, index.settings, index.digest)


def scan(path: Path) -> tuple[Layout, Iterator[tuple[Entry, Record]]]:
    """The samples of a finished folder in the order of their ids, each shard checked as it is reached."""
    layout, shards = _finished(path)
    return layout, (
        sample
        for index, shard in enumerate(shards)
        for sample in _samples(path / shard["file"], shard["sha256"], layout.ids(index), layout)
    )


def _finished(path: Path) -> tuple[Layout, list[dict[str, Any]]]:
    layout, shards = read_manifest(path)
    if len(shards) < layout.shard_count():
        raise UsageError(
            f"{path} is not finished",
            f"it holds {len(shards)} of {layout.shard_count()} shards",
            "run the same dfkd-generate again, which makes what is missing",
        )
    return layout, shards


def _index(
    path: Path, layout: Layout, samples: Sequence[tuple[Entry, int, int]], left_out: Sequence[BadSample] = ()
) -> ShardPool:
    entries, labels, ids = zip(*samples, strict=True)
    shards = "".join(shard["sha256"] for shard in read_manifest(path)[1])
    without = "".join(f" {sample.id}" for sample in left_out)
    digest = hashlib.sha256((shards + without).encode()).hexdigest()
    return ShardPool(layout, entries, torch.tensor(labels), torch.tensor(ids), digest, tuple(left_out))


def _samples(file: Path, wanted: str, ids: range, layout: Layout) -> Iterator[tuple[Entry, Record]]:
    if not file.is_file():
        raise UsageError(f"{file} is absent", "the manifest beside it lists it", REPAIR)
    if sha256(file) != wanted:
        _, bad = examine(file, ids, layout)
        damaged = in_words(bad) if bad else "every image in it can be read"
        raise UsageError(f"{file} was altered", f"its hash is not the one in the manifest; {damaged}", REPAIR)
    return _members(file, layout)


def _members(file: Path, layout: Layout) -> Iterator[tuple[Entry, Record]]:
    """The samples of a shard that is whole, in the order of their ids."""
    with tarfile.open(file) as tar:
        members = {member.name: member for member in tar}
        for name in sorted(name for name in members if name.endswith(".json")):
            image = members[name.removesuffix("json") + layout.image_format]
            data = tar.extractfile(members[name])
            assert data is not None  # our shards hold regular files alone
            yield Entry(file, image.offset_data, image.size), record_of(json.load(data))
