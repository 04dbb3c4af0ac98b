"""What is known of a stored engine: manifest.json beside its payload."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from dfkd_engine.errors import EngineError
from dfkd_engine.spec import EngineSpec, canonical_json, differing
from dfkd_engine.storage.payload import FileRecord

MANIFEST = "manifest.json"
VERSION = 1

_FIELDS = {"version", "key", "spec", "files", "facts", "created", "digest"}


@dataclass(frozen=True)
class Manifest:
    """One engine of a store.

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
        """Raises ValueError with a phrase that says why ``text`` is not the manifest of the engine ``key``."""
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"{MANIFEST} is not JSON") from None
        if not isinstance(plain, dict) or "version" not in plain:
            raise ValueError(f"{MANIFEST} holds no manifest")
        if type(plain["version"]) is not int or plain["version"] != VERSION:
            raise ValueError(f"{MANIFEST} is of version {plain['version']!r}, this program reads {VERSION}")
        digest = plain.pop("digest", None)
        if plain.keys() != _FIELDS - {"digest"} or digest != _digest(plain):
            raise ValueError(f"{MANIFEST} was altered: its digest is not the one on record")
        try:
            spec = EngineSpec.from_json(plain["spec"])
            files = {name: FileRecord(file["sha256"], file["bytes"]) for name, file in plain["files"].items()}
            datetime.fromisoformat(plain["created"])
        except EngineError as error:
            raise ValueError(f"{MANIFEST}: {error.what} ({error.why})") from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{MANIFEST} holds no manifest ({type(error).__name__}: {error})") from None
        if not isinstance(plain["facts"], dict) or not all(type(file.bytes) is int for file in files.values()):
            raise ValueError(f"{MANIFEST} holds no manifest")
        if not plain["key"] == spec.key() == key:
            raise ValueError(f"{MANIFEST} is that of {plain['key']}, for a spec with the key {spec.key()}")
        return cls(key, spec, files, plain["facts"], plain["created"])


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the engine in ``folder``, whose name is the key; raises ValueError with a phrase for the why."""
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
    return Manifest.from_text(text, folder.name)


def plain_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON reads them back; raises EngineError for what JSON cannot hold, such as a tensor or NaN."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(facts), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        why = f"they are no plain JSON ({error})"
        raise EngineError("the facts measured of an engine cannot be kept", why, "return finite numbers") from None
    return plain


def require_fits(manifest: Manifest, versions: Mapping[str, str], device: str) -> None:
    """Raise EngineError, naming each field, unless the engine was built for these package versions and this device."""
    there = {"device": manifest.spec.device} | {f"versions.{name}": value for name, value in manifest.spec.versions}
    here = {"device": device} | {f"versions.{name}": value for name, value in versions.items()}
    fields = [f"{field} is {was} there and {now} here" for field, was, now in differing(there, here)]
    if fields:
        todo = "build one for this machine with dfkd-engines build"
        raise EngineError(f"the engine {manifest} does not fit this machine", "; ".join(fields), todo)


def _digest(plain: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON: finds a manifest that was edited or has rotted."""
    return hashlib.sha256(canonical_json(plain).encode()).hexdigest()
