"""What is known of a stored engine, and whether its files still are what was stored.

Compiled code is code: every byte is hashed before it is loaded for the first time in a process.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from dfkd_engine.errors import EngineError
from dfkd_engine.files import sha256, sha256_once, sync_file, sync_folder
from dfkd_engine.spec import EngineSpec, canonical_json

MANIFEST = "manifest.json"
VERSION = 2

_FIELDS = {"version", "key", "spec", "files", "facts", "created"}


@dataclass(frozen=True)
class FileRecord:
    """sha256: 64 hexadecimal digits of the file's bytes. bytes: its size."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """One engine of a store: manifest.json beside its payload.

    key: its folder's name, which is spec.key(). files: path below payload/ -> SHA-256 and size. facts: what was
    measured when it was built (parity, seconds, milliseconds), plain JSON. created: UTC, ISO 8601.
    """

    key: str
    spec: EngineSpec
    files: Mapping[str, FileRecord]
    facts: Mapping[str, Any]
    created: str

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    def __str__(self) -> str:
        return f"{self.spec.network} {self.key}"

    def to_text(self) -> str:
        files = {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in self.files.items()}
        plain = {"version": VERSION, "key": self.key, "spec": self.spec.to_json(), "files": files}
        plain |= {"facts": self.facts, "created": self.created}
        return json.dumps(plain | {"digest": _digest(plain)}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_text(cls, text: str, key: str) -> Self:
        """The manifest of the engine `key`, read from the text of its file.

        Raises ValueError with a phrase that says why `text` is none: no JSON, another version, digest or key.
        """
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"{MANIFEST} is not JSON") from None
        if not isinstance(plain, dict) or "version" not in plain:
            raise ValueError(f"{MANIFEST} holds no manifest")
        if plain["version"] != VERSION:
            raise ValueError(f"{MANIFEST} is of version {plain['version']!r}, this program reads {VERSION}")
        digest = plain.pop("digest", None)
        if plain.keys() != _FIELDS or digest != _digest(plain):
            raise ValueError(f"{MANIFEST} was altered: its digest is not the one on record")
        try:
            spec = EngineSpec.from_json(plain["spec"])
            files = {name: FileRecord(file["sha256"], int(file["bytes"])) for name, file in plain["files"].items()}
            datetime.fromisoformat(plain["created"])
        except EngineError as error:
            raise ValueError(f"{MANIFEST}: {error.what} ({error.why})") from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{MANIFEST} holds no manifest ({type(error).__name__}: {error})") from None
        if not plain["key"] == spec.key() == key:
            raise ValueError(f"{MANIFEST} is that of {plain['key']}, for a spec with the key {spec.key()}")
        return cls(key, spec, files, plain["facts"], plain["created"])

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of the engine in `folder`, whose name is the key; ValueError says why not."""
        path = folder / MANIFEST
        if folder.is_symlink() or path.is_symlink():
            raise ValueError(f"{folder.name if folder.is_symlink() else MANIFEST} is a link")
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ValueError(f"{MANIFEST} is missing") from None
        except UnicodeDecodeError:
            raise ValueError(f"{MANIFEST} is not JSON") from None
        except OSError as error:
            raise ValueError(f"{MANIFEST} cannot be read ({error.strerror or error})") from None
        return cls.from_text(text, folder.name)


def plain_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts in JSON's types; raises EngineError for what JSON cannot hold, such as a tensor or NaN."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(facts), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        why = f"they are no plain JSON ({error})"
        raise EngineError("the facts measured of an engine cannot be kept", why, "return finite numbers") from None
    return plain


def record(folder: Path) -> dict[str, FileRecord]:
    """Flush every file under `folder` to the disk; relative path (with "/") -> what it holds, sorted.

    Raises EngineError where there is no file, a link or anything else that is not a plain file; OSError of the disk.
    """
    sizes, problem = _scan(folder)
    if problem is None and not sizes:
        problem = "no file was written"
    if problem is not None:
        raise EngineError(f"the new engine in {folder} cannot be kept", problem, "correct the backend's compile")
    for name in sizes:
        sync_file(folder / name)
    for inner in sorted(path for path in folder.rglob("*") if path.is_dir()):
        sync_folder(inner)
    sync_folder(folder)
    return {name: FileRecord(sha256(folder / name), sizes[name]) for name in sorted(sizes)}


def damage(folder: Path, files: Mapping[str, FileRecord]) -> str | None:
    """What is wrong with the files under `folder`, as a phrase; None where they are exactly those on record."""
    try:
        sizes, problem = _scan(folder)
        if problem is not None:
            return problem
        if missing := sorted(files.keys() - sizes.keys()):
            return f"{missing[0]} is missing"
        if extra := sorted(sizes.keys() - files.keys()):
            return f"{extra[0]} does not belong to it"
        for name, file in files.items():
            if sizes[name] != file.bytes:
                return f"{name} has {sizes[name]} bytes, on record are {file.bytes}"
            if sha256_once(folder / name) != file.sha256:
                return f"{name} was altered: its SHA-256 is not the one on record"
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror or error})"
    return None


def _scan(folder: Path) -> tuple[dict[str, int], str | None]:
    """The size of every plain file under `folder`, and what else lies there."""
    sizes: dict[str, int] = {}
    if folder.is_symlink() or not folder.is_dir():
        return sizes, f"{folder.name} is {'a link' if folder.is_symlink() else 'no folder'}"
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                name, status = Path(entry.path).relative_to(folder).as_posix(), entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(Path(entry.path))
                elif stat.S_ISREG(status.st_mode):
                    sizes[name] = status.st_size
                else:
                    return sizes, f"{name} is {'a link' if stat.S_ISLNK(status.st_mode) else 'no plain file'}"
    return sizes, None


def _digest(plain: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON: finds a manifest that was edited or has rotted."""
    return hashlib.sha256(canonical_json(plain).encode()).hexdigest()
