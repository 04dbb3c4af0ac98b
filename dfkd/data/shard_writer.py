"""Writing a folder of shards: atomic, resumable, one run at a time, by one process or several."""

import io
import json
import shutil
import tarfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from dfkd.config import IMAGE_FORMATS
from dfkd.data.codec import encode
from dfkd.data.shards import MANIFEST, VERSION, Layout, Record, index_text, read_manifest
from dfkd.errors import UsageError
from dfkd.files import PARTIAL, folder_lock, locked, make_writable, remove_partials, replace_file, replace_text, sha256
from dfkd.runtime import Rank

WAIT = 0.5  # seconds between two looks at what the other processes have done


class ShardFolder:
    """The writing side of a folder of shards; holds its lock until closed, best by ``with``.

    Processes of one run share a folder: each writes the shards whose index is its rank modulo their number, the first
    holds the lock, and each commits what it has written under a second lock, held for that moment only.
    """

    def __init__(self, path: Path, layout: Layout, shards: Sequence[dict[str, Any]], rank: Rank) -> None:
        self.path, self.layout, self.rank = path, layout, rank
        self._shards = {entry["file"]: entry for entry in shards}
        self._lock = ExitStack()

    @classmethod
    def create_or_open(
        cls,
        path: Path,
        settings: Mapping[str, Any],
        class_names: Sequence[str],
        image_size: int,
        image_format: str,
        count: int,
        shard_size: int,
        rank: Rank = Rank(),  # noqa: B008 (frozen)
        run: Mapping[str, Any] | None = None,
    ) -> Self:
        """Start a folder, or take up one that a run of the same settings has begun.

        settings: what identifies the images. run: how they will be computed (call size, threads, engines); a folder
        that has begun keeps what it has on record, which `.run` gives. Both are plain JSON values.
        Raises UsageError when the folder cannot be written, is in use, or belongs to other settings (naming each field
        with both values), and for a count below 1.
        """
        if count < 1:
            raise UsageError(f"count is {count}", "it must be at least 1")
        if image_format not in IMAGE_FORMATS:
            raise UsageError(f"image format {image_format!r} is unknown", f"known are {', '.join(IMAGE_FORMATS)}")
        layout = Layout(
            _plain(settings), tuple(class_names), image_size, image_format, count, shard_size, _plain(run or {})
        )
        shards: list[dict[str, Any]] = []
        make_writable(path)
        with ExitStack() as lock:
            if rank.first:
                lock.enter_context(folder_lock(path))
            with _committing(path):
                if rank.count == 1:
                    remove_partials(path)
                for name in ("shard-*", MANIFEST):  # which nobody is writing while we hold the lock
                    for leftover in path.glob(name + PARTIAL):
                        leftover.unlink()
                new = not (path / MANIFEST).exists()
                if not new:
                    found, shards = read_manifest(path)
                    _refuse_other(path, found, layout)
                    layout = found
                elif any(path.glob("shard-*.tar")):
                    raise UsageError(
                        f"{path} holds shards without {MANIFEST}", "they would be overwritten", "choose another --out"
                    )
                folder = cls(path, layout, shards, rank)
                if new:
                    folder._write_manifest()
                for file in folder._shards if rank.first else ():
                    _write_index(path / file)
            folder._lock = lock.pop_all()
            return folder

    @property
    def run(self) -> Mapping[str, Any]:
        """How the images of this folder are computed, on record in its manifest."""
        return self.layout.run

    def record(self, **facts: Any) -> None:
        """Replace some of what `run` has on record, from here on and for whoever continues the folder."""
        with _committing(self.path):
            self._read_manifest()
            self.layout = replace(self.layout, run=_plain({**self.run, **facts}))
            self._write_manifest()

    def missing(self) -> list[int]:
        """Shards of this process that are absent or whose bytes are not those that the manifest has on record."""
        return [i for i in range(self.layout.shard_count()) if self.rank.owns(i) and not self._whole(i)]

    def missing_of_others(self) -> list[int]:
        """Shards of the other processes that are absent or altered, by the manifest at this moment."""
        self._read_manifest()
        return [i for i in range(self.layout.shard_count()) if not self.rank.owns(i) and not self._whole(i)]

    def wait_for_others(self) -> None:
        """Return when every shard of the other processes is there; torchrun ends this process if one of them fails."""
        pending = self.missing_of_others()
        while pending:
            time.sleep(WAIT)
            self._read_manifest()
            pending = [index for index in pending if not self._whole(index)]

    def wait_for_record(self, names: Collection[str]) -> None:
        """Return when `run` has these facts on record, which the first process finds out."""
        while not set(names) <= self.run.keys():
            time.sleep(WAIT)
            self._read_manifest()

    def entry(self, index: int) -> Mapping[str, Any]:
        """What the manifest has on record of one shard; {} of one that was not written yet."""
        return self._shards.get(_file_name(index), {})

    def write(
        self,
        index: int,
        images: NDArray[np.uint8],
        records: Sequence[Record],
        seconds: float = 0.0,
        facts: Mapping[str, Any] | None = None,
    ) -> Path:
        """Commit one shard: images uint8 [n, H, W, 3] and their records, both in the order of the shard's ids.

        facts: what else the manifest has on record of it, plain JSON values.
        """
        ids, size = self.layout.ids(index), self.layout.image_size
        if [record.id for record in records] != list(ids):
            raise ValueError(f"shard {index} holds the ids {ids.start} to {ids.stop - 1}, in that order")
        if images.shape != (len(ids), size, size, 3) or images.dtype != np.uint8:
            raise ValueError(f"images are {images.dtype} {images.shape}; want uint8 {(len(ids), size, size, 3)}")
        dropped = [record.id for record in records if record.dropped is not None]
        file = _file_name(index)
        path = self.path / file
        with _committing(self.path):
            replace_file(path, lambda out: _write_tar(out, images, records, self.layout.image_format))
            _write_index(path)
            self._read_manifest()
            self._shards[file] = {
                "file": file,
                "first_id": ids.start,
                "count": len(ids),
                "sha256": sha256(path),
                "seconds": round(seconds, 3),
                **({"dropped": dropped} if dropped else {}),
                **(facts or {}),
            }
            self._write_manifest()
        return path

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _whole(self, index: int) -> bool:
        entry, path = self._shards.get(_file_name(index)), self.path / _file_name(index)
        return entry is not None and path.is_file() and sha256(path) == entry["sha256"]

    def _read_manifest(self) -> None:
        self.layout, shards = read_manifest(self.path)
        self._shards = {entry["file"]: entry for entry in shards}

    def _write_manifest(self) -> None:
        shards = [self._shards[file] for file in sorted(self._shards)]
        manifest = {"version": VERSION, **asdict(self.layout), "shards": shards}
        replace_text(self.path / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def require_space(folder: Path, count: int, size: int, image_format: str) -> None:
    """Raise UsageError when the disk of ``folder`` (which need not exist yet) cannot hold the images asked for."""
    needed = required_bytes(count, size, image_format)
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UsageError(
            f"{count} images of {size}x{size} as {image_format} need up to {needed / 1e9:.2f} GB",
            f"the disk of {existing} has {free / 1e9:.2f} GB free",
            "free some space, choose another --out, or ask for fewer images",
        )


def required_bytes(count: int, size: int, image_format: str) -> int:
    """Disk space of ``count`` images of ``size`` x ``size`` at most: pixels that do not compress.

    For JPEG half of the raw size and a header are reckoned, which photos stay below and pure noise does not.
    """
    raw = 3 * size * size
    pixels = raw // 2 + 1024 if image_format == "jpg" else raw + raw // 100 + 256
    # Three tar headers with padding, and a record with the losses of some hundred steps.
    return count * (pixels + 3 * 1024 + 4096)


def _committing(path: Path) -> AbstractContextManager[None]:
    """Alone among the processes that commit to the folder; waits for its turn."""
    return locked(path / ".commit", lambda owner: None)


def _write_tar(out: BinaryIO, images: NDArray[np.uint8], records: Sequence[Record], image_format: str) -> None:
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for image, record in zip(images, records, strict=True):
            parts = {
                image_format: encode(image, image_format),
                "cls": str(record.label).encode(),
                "json": json.dumps(record.to_json(), sort_keys=True).encode(),
            }
            for extension, data in parts.items():
                info = tarfile.TarInfo(f"{record.id:08d}.{extension}")  # mtime, uid and gid are 0, names empty
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _write_index(shard: Path) -> None:
    """Write the index where it is absent or not the shard's; nothing where the shard itself is absent or damaged."""
    path, wanted = shard.with_suffix(".idx"), index_text(shard)
    if wanted and not (path.exists() and path.read_bytes() == wanted.encode()):
        replace_text(path, wanted)


def _file_name(index: int) -> str:
    return f"shard-{index:05d}.tar"


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON reads back, so that settings compare equal with a manifest's."""
    plain: dict[str, Any] = json.loads(json.dumps(settings, sort_keys=True))
    return plain


def _refuse_other(path: Path, found: Layout, wanted: Layout) -> None:
    there, asked = _flat(asdict(found)), _flat(asdict(wanted))
    absent = "(absent)"
    differing = [
        f"{key.removeprefix('settings.')} is {there.get(key, absent)} there and {asked.get(key, absent)} here"
        for key in sorted(there.keys() | asked.keys())
        if there.get(key, absent) != asked.get(key, absent) and key.partition(".")[0] != "run"
    ]
    if differing:
        todo = "repeat those settings, or choose another --out"
        raise UsageError(f"{path} holds images of other settings", "; ".join(differing), todo)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item})
    return flat
