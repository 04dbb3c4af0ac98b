"""Synthetic images on disk, and how they are read: WebDataset tar files and a manifest.

    DIR/manifest.json      version, settings, run, class_names, image_size, image_format, count, shard_size,
                           shards: [{file, first_id, count, sha256, seconds, ...}], with the ids that are `dropped`
    DIR/shard-00000.tar    <id:08d>.png|jpg|npy (pixels), <id:08d>.cls (label), <id:08d>.json (record), ids ascending
    DIR/shard-00000.idx    where each file of the shard begins, for DALI's readers.webdataset

The shard is the unit of commit: written beside, flushed, renamed, and counted once the manifest has its hash. Its bytes
are a function of its images and records alone (no time, owner or order of dictionaries), so a run that was killed and
started again ends with the same bytes as one that was not.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfkd.data.codec import decode
from dfkd.errors import UsageError
from dfkd.files import sha256

VERSION = 1
MANIFEST = "manifest.json"
REPAIR = "run the same dfkd-generate again, which repairs it"


@dataclass(frozen=True)
class Record:
    """What is known of one image.

    partner and box (y0, x0, y1, x1 in latent cells) are those of the last CutMix, None without one; losses are the
    final ones by name; loss_curve holds the guidance losses of every step, rounded; teacher_probability is the
    teacher's for the label. mixup: the image's own share of the last latent mixup, in the place of a box. step: the
    denoising step, counted from 0, of which the image is the clean estimate; None: the image is the finished one.
    candidate and score: which of several images it is, and what it was kept for. agreement: share of its views that the
    teacher reads as the label. dropped: why readers leave it out, None where they do not. teachers: of several, those
    that guided it, by name.
    """

    id: int
    label: int
    class_name: str
    seed: int
    prompt: str
    partner: int | None = None
    box: tuple[int, int, int, int] | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    loss_curve: Mapping[str, Sequence[float]] = field(default_factory=dict)
    teacher_probability: float = 0.0
    mixup: float | None = None
    step: int | None = None
    candidate: int | None = None
    score: float | None = None
    agreement: float | None = None
    dropped: str | None = None
    teachers: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """The record in JSON's types; what most images do not have only where it is there."""
        return {name: value for name, value in asdict(self).items() if value is not None or name not in _RARE}


_RARE = ("mixup", "step", "candidate", "score", "agreement", "dropped", "teachers")


@dataclass(frozen=True)
class Layout:
    """What all shards of a folder have in common.

    settings identify the images: two runs share a folder only when everything but `run` is equal. run: how the images
    were computed (call size, threads, engines), which a continued run takes over.
    """

    settings: Mapping[str, Any]
    class_names: tuple[str, ...]
    image_size: int
    image_format: str
    count: int
    shard_size: int
    run: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def ids(self, index: int) -> range:
        """The image ids of one shard."""
        return range(index * self.shard_size, min(self.count, (index + 1) * self.shard_size))

    def shard_count(self) -> int:
        return -(-self.count // self.shard_size)


@dataclass(frozen=True)
class BadSample:
    """An image that cannot be used. file: the shard or image file; id: its id in its own folder; why: for people."""

    file: Path
    id: int
    why: str

    def __str__(self) -> str:
        return f"{self.file}: image {self.id} ({self.why})"


def damage_text(bad: Sequence[BadSample], most: int = 10) -> str:
    """Files and ids of damaged images, with the reasons of the first `most`."""
    named = [str(sample) for sample in bad[:most]]
    rest = [f"and the images {', '.join(str(sample.id) for sample in bad[most:])}"] if len(bad) > most else []
    return "; ".join(named + rest)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one file of a shard lies: `size` bytes from `offset` on."""

    file: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes. Raises OSError, or ValueError where the shard has come to an end before."""
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise ValueError(f"the file ends {self.size - len(data)} bytes before it")
        return data


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
    """The images of a folder of shards, decoded when they are read; labels and ids alone are in memory.

    left_out: damaged images of the folder, which are not among these; the digest tells them too. dropped: ids of whole
    images that are not among these, as their records say. A pool may be sent to other processes; each opens the files
    for itself.
    """

    def __init__(
        self,
        layout: Layout,
        samples: Sequence[tuple[Entry, int, int]],
        digest: str,
        left_out: Sequence[BadSample] = (),
        dropped: Sequence[int] = (),
    ) -> None:
        """samples: where each image lies, its id and its label."""
        self.layout, self.digest, self.left_out, self.dropped = layout, digest, tuple(left_out), tuple(dropped)
        self._entries, ids, labels = zip(*samples, strict=True)
        self.ids, self.labels = torch.tensor(ids), torch.tensor(labels)
        self.class_names, self.image_size, self.settings = layout.class_names, layout.image_size, layout.settings
        self.files = "" if layout.image_format == "npy" else "sized"

    def read(self, positions: Tensor) -> Tensor:
        """uint8 [n, 3, H, W] at int64 [n] positions; raises UsageError naming file and id of one that is damaged."""
        images = np.empty((len(positions), self.image_size, self.image_size, 3), np.uint8)
        for row, position in enumerate(positions.tolist()):
            with self._named(position):
                images[row] = decode(self._entries[position].read(), self.layout.image_format)
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def encoded(self, positions: Tensor) -> list[NDArray[np.uint8]]:
        """Bytes of the image files at int64 [n] positions; raises UsageError naming file and id of a damaged one."""
        found = []
        for position in positions.tolist():
            with self._named(position):
                found.append(np.frombuffer(self._entries[position].read(), np.uint8))
        return found

    def records(self) -> Iterator[Record]:
        """The record of every image, in the order of the ids, read from the shards."""
        for file, group in groupby(zip(self._entries, self.ids.tolist(), strict=True), lambda pair: pair[0].file):
            entries, _ = _entries(file)
            for _, number in group:
                yield _record(entries[f"{number:08d}.json"])

    @contextmanager
    def _named(self, position: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            what = f"{self._entries[position].file}: image {int(self.ids[position])} cannot be read"
            raise UsageError(what, str(error), REPAIR) from None


def read_manifest(path: Path) -> tuple[Layout, list[dict[str, Any]]]:
    """The layout of a folder and its committed shards in order; raises UsageError where there is none to read."""
    todo = "give a folder that dfkd-generate wrote, or restore its manifest"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version = manifest.pop("version")
        shards = sorted(manifest.pop("shards"), key=lambda entry: str(entry["file"]))
        layout = Layout(**{**manifest, "class_names": tuple(manifest["class_names"])})
    except OSError as error:
        raise UsageError(f"cannot read {path / MANIFEST}", error.strerror or str(error), todo) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path / MANIFEST} is damaged", f"{type(error).__name__} {error}", todo) from None
    if version != VERSION:
        raise UsageError(f"{path / MANIFEST} has version {version}", f"this program reads version {VERSION}", todo)
    return layout, shards


def open_folder(path: Path | str, on_bad_sample: str = "fail", until: int | None = None) -> ShardPool:
    """The images of a finished folder of shards, whose hashes are checked.

    until: those of smaller ids alone, whole shards, of a folder that needs to be finished so far only.
    on_bad_sample: fail: raises UsageError for a missing or altered shard, naming it and the images in it that are
    damaged. skip: those are left out, found by decoding the images of altered shards once; what is left depends on
    nothing but the folder. Images that their records say are dropped are never among these. Raises UsageError where
    nothing is left.
    """
    path = Path(path)
    layout, shards = read_manifest(path)
    wanted = layout.shard_count()
    if until is not None:
        wanted = -(-until // layout.shard_size)
        shards = shards[:wanted]
    if len(shards) < wanted:
        raise UsageError(
            f"{path} is not finished",
            f"it holds {len(shards)} of {wanted} shards",
            "run the same dfkd-generate again, which makes what is missing",
        )
    found: list[tuple[Entry, int, int]] = []
    left_out: list[BadSample] = []
    dropped: list[int] = []
    for index, shard in enumerate(shards):
        file = path / shard["file"]
        whole = file.is_file() and sha256(file) == shard["sha256"]
        good, bad, unused = _samples(file, layout, layout.ids(index), check=not whole)
        if on_bad_sample == "fail" and (bad or not whole):
            if not file.exists():
                raise UsageError(f"{file} is absent", "the manifest beside it lists it", REPAIR)
            damaged = damage_text(bad) or "every image in it can be read"
            raise UsageError(f"{file} was altered", f"its hash is not the one in the manifest; {damaged}", REPAIR)
        found += good
        left_out += bad
        dropped += unused
    if not found and dropped:
        what = f"none of the {len(dropped)} images of {path} is to be used"
        why = "the teacher reads none of them as its label under other views; the images stay where they are"
        raise UsageError(what, why, "look at preview.png, lower --filter-agreement, or guide them more strongly")
    if not found:
        raise UsageError(f"{path} holds no image that can be read", damage_text(left_out, 1), REPAIR)
    hashes = "".join(shard["sha256"] for shard in shards) + "".join(f" {sample.id}" for sample in left_out)
    digest = hashlib.sha256(hashes.encode()).hexdigest()
    return ShardPool(layout, found, digest, left_out, dropped)


def read_folder(path: Path) -> Pool:
    """All images and records of a finished folder; raises UsageError naming the file (and id) that is damaged."""
    pool = open_folder(path)
    images, records = pool.read(torch.arange(len(pool.ids))), tuple(pool.records())
    return Pool(images, pool.labels, pool.ids, pool.class_names, records, pool.settings, pool.digest)


def index_text(shard: Path) -> str | None:
    """What DALI's wds2idx writes of a shard: `v1.2 N`, then extension, offset, size and name of each sample's files;
    None where the shard is absent or no whole tar file."""
    entries, damage = _entries(shard)
    lines: dict[str, list[str]] = {}
    for name, entry in entries.items():
        stem, _, extension = name.partition(".")
        lines.setdefault(stem, []).append(f"{extension} {entry.offset} {entry.size} {name}")
    return None if damage else "\n".join([f"v1.2 {len(lines)}", *map(" ".join, lines.values())]) + "\n"


def _samples(
    file: Path, layout: Layout, ids: range, check: bool
) -> tuple[list[tuple[Entry, int, int]], list[BadSample], list[int]]:
    """Place, id and label of the images of one shard that are to be used, its damaged ones, and the ids of the dropped.

    check: decode every image once.
    """
    entries, damage = _entries(file)
    good, bad, dropped = [], [], []
    for number in ids:
        try:
            image, text = (entries[f"{number:08d}.{extension}"] for extension in (layout.image_format, "json"))
            record = _record(text)
            if check:
                shape = decode(image.read(), layout.image_format).shape
                if record.id != number or shape != (layout.image_size, layout.image_size, 3):
                    raise ValueError(f"it is image {record.id} of shape {shape}")
            if record.dropped is not None:
                dropped.append(number)
            else:
                good.append((image, number, record.label))
        except KeyError:
            bad.append(BadSample(file, number, f"absent: {damage or 'the shard does not hold it'}"))
        except (OSError, ValueError, TypeError) as error:
            bad.append(BadSample(file, number, str(error)))
    return good, bad, dropped


def _entries(file: Path) -> tuple[dict[str, Entry], str]:
    """The files in a tar file up to where it can be read, by name, and the damage there ("" for none)."""
    found: dict[str, Entry] = {}
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                found[member.name] = Entry(file, member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        return found, str(error)
    return found, ""


def _record(entry: Entry) -> Record:
    """A record from its JSON file; raises OSError, ValueError, TypeError or KeyError for anything else."""
    fields = json.loads(entry.read())
    box = fields["box"]
    return Record(**{**fields, "box": None if box is None else (box[0], box[1], box[2], box[3])})
