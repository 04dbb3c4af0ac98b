"""Compiled engines on disk, named by what they are made of: whole or absent, and hashed before they are loaded.

    <key>/manifest.json, <key>/payload/   one engine; the key is EngineSpec.key()
    partial/                              engines under construction or removal, each named <key>.<something>; whoever
                                          holds the key's lock may remove what lies there: it is a killed process's
    locks/                                one file per engine that is being changed

One process builds an engine, others that want it wait for that one. Nothing here imports torch.
"""

import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from dfkd_engine.errors import EngineError
from dfkd_engine.files import compiler_errors, explained, locked, remove, replace_text, sync_folder
from dfkd_engine.manifest import MANIFEST, FileRecord, Manifest, damage, plain_facts, record
from dfkd_engine.spec import ABSENT, Difference, EngineSpec, differences

__all__ = ["EngineStore", "FileRecord", "Manifest", "Verdict"]

Make = Callable[[Path], Mapping[str, Any]]
Differences = list[Difference]
_KEY = re.compile(r"[0-9a-f]{24}")
_BUILD = "build it with dfkd-engines build"


class Verdict(NamedTuple):
    """key, network ("?" where its manifest does not tell), and what is wrong with the engine; None: nothing."""

    key: str
    network: str
    problem: str | None


Verdicts = list[Verdict]


class _Busy(Exception):
    """Another process holds the lock."""


class EngineStore:
    """The engines below `root`; reading creates nothing.

    say: gets one line where another process is waited for; without it the line goes to stderr.
    """

    def __init__(self, root: Path, say: Callable[[str], object] | None = None) -> None:
        self.root = Path(root)
        self._partial, self._locks = self.root / "partial", self.root / "locks"
        self._say = say if say is not None else _to_stderr

    # reading

    def find(self, spec: EngineSpec) -> Manifest | None:
        """The engine of this spec; None: there is none, or its manifest cannot be used.

        Quick: one small file is read, no payload. `problem` and `verify` say what is wrong; a build mends it.
        """
        try:
            return Manifest.read(self.root / spec.key())
        except ValueError:
            return None

    def get(self, key: str) -> Manifest | None:
        """The engine of this key, None where there is none; raises EngineError where its manifest is damaged."""
        if not _KEY.fullmatch(key):
            raise EngineError(f"{key!r} is no engine's key", "it has 24 hexadecimal digits", "see dfkd-engines list")
        if not self._has(key):
            return None
        try:
            return Manifest.read(self.root / key)
        except ValueError as error:
            raise self._damaged(key, str(error)) from None

    def payload(self, manifest: Manifest) -> Path:
        """The folder of the engine's files, every one verified by size and SHA-256; whoever loads them writes nothing.

        The second call of a process hashes no more, unless a file has changed. Raises EngineError for damage, or where
        the engine is not in this store.
        """
        stored = self.get(manifest.key)
        if stored is None:
            raise EngineError(f"the engine {manifest} is missing", f"{self.root} does not hold it", _BUILD)
        folder = self.root / manifest.key / "payload"
        if (problem := damage(folder, stored.files)) is not None:
            raise self._damaged(str(manifest), problem)
        return folder

    def problem(self, key: str) -> str | None:
        """What is wrong with the engine of this key, hashing its files where that was not done yet; None: nothing."""
        if not self._has(key):
            return "it is missing"
        try:
            manifest = Manifest.read(self.root / key)
        except ValueError as error:
            return str(error)
        return damage(self.root / key / "payload", manifest.files)

    def list(self) -> tuple[Manifest, ...]:
        """Every engine whose manifest can be read, by network and age; `verify` names the others."""
        found = []
        for key in self._keys():
            with suppress(ValueError):
                found.append(Manifest.read(self.root / key))
        return tuple(sorted(found, key=lambda manifest: (manifest.spec.network, manifest.created, manifest.key)))

    def verify(self) -> Verdicts:
        """Every engine with what is wrong with it, by network and key; each file is hashed."""
        networks = {manifest.key: manifest.spec.network for manifest in self.list()}
        verdicts = [Verdict(key, networks.get(key, "?"), self.problem(key)) for key in self._keys()]
        return sorted(verdicts, key=lambda verdict: (verdict.network, verdict.key))

    def explain(self, spec: EngineSpec) -> Differences:
        """Why there is no usable engine of this spec, as (field, there, here); [] where there is one.

        "There" is the engine of the same network that differs in the fewest fields, of equals the newest. A damaged
        engine differs in the field "engine"; a network without engines in "network".
        """
        key = spec.key()
        if self._has(key):
            problem = self.problem(key)
            return [] if problem is None else [("engine", problem, key)]
        near = [differences(m.spec, spec) for m in reversed(self.list()) if m.spec.network == spec.network]
        return min(near, key=len, default=[("network", ABSENT, spec.network)])

    def differing_only(self, spec: EngineSpec, field: str) -> tuple[Manifest, ...]:
        """Whole engines whose spec differs from this one in `field` alone, the newest first."""
        found = [
            manifest
            for manifest in self.list()
            if getattr(manifest.spec, field) != getattr(spec, field)
            and replace(manifest.spec, **{field: getattr(spec, field)}) == spec
            and self.problem(manifest.key) is None
        ]
        return tuple(sorted(found, key=lambda manifest: manifest.created, reverse=True))

    # writing

    def build(self, spec: EngineSpec, make: Make) -> Manifest:
        """The engine of `spec`, made where it is missing or damaged.

        make(folder) writes the payload into an empty folder and returns what it measured, as plain JSON. Where another
        process builds the same engine, that one is awaited and its engine taken. A damaged engine stays until its
        successor is whole. Whatever make raises passes through, and nothing remains of its files; a full, read-only or
        failing disk raises EngineError.
        """
        key, name = spec.key(), f"{spec.network} {spec.key()}"
        what = f"cannot write the engine {name} to {self.root}"
        with self._holding(key, what, waiting_for=f"the engine {name}"):
            with explained(what, self.root):
                self._clear(key)
            with suppress(OSError, EngineError):  # room only: leftovers of another's engines may be another's files
                self._sweep()
            if self.problem(key) is not None:
                self._make(spec, make, what)
            return Manifest.read(self.root / key)

    def prune(self, keep: Collection[str], older_than: timedelta | None = None) -> int:
        """Remove engines that are neither in `keep` nor younger than `older_than`; returns the bytes freed.

        What killed processes left goes too. An engine that is being built stays.
        """
        if not self.root.is_dir():
            return 0
        freed, what = 0, f"cannot remove engines from {self.root}"
        for key in self._keys():
            with suppress(_Busy), self._holding(key, what), explained(what, self.root):
                if key not in keep and self._has(key) and (older_than is None or self._age(key) >= older_than):
                    freed += self._take(key)
        with explained(what, self.root):
            return freed + self._sweep()

    def _make(self, spec: EngineSpec, make: Make, what: str) -> None:
        # A new name every time: a killed builder's compiler may still write to the last one.
        place = self._aside(spec.key())
        folder = place / "payload"
        try:
            with explained(what, self.root):
                folder.mkdir(parents=True)
            with compiler_errors(what, self.root):
                facts = plain_facts(make(folder))
            with explained(what, self.root):
                created = datetime.now(UTC).isoformat(timespec="seconds")
                manifest = Manifest(spec.key(), spec, record(folder), facts, created)
                replace_text(place / MANIFEST, manifest.to_text())
                self._take(spec.key())  # killed after this, the place is empty: a miss, which the next build fills
                os.rename(place, self.root / spec.key())
                sync_folder(self.root)
        finally:
            shutil.rmtree(place, ignore_errors=True)  # what cannot be removed now, the next build sweeps

    @contextmanager
    def _holding(self, key: str, what: str, waiting_for: str = "") -> Iterator[None]:
        """Hold the lock of `key`, making the store's folders first.

        waiting_for: what the line that tells of a wait says another process is at work on; "" raises `_Busy` instead.
        A disk that refuses raises EngineError(what, ...).
        """

        def busy(owner: str) -> None:
            if not waiting_for:
                raise _Busy
            self._say(f"waiting for process {owner}, which is at work on {waiting_for}")

        with ExitStack() as stack:
            with explained(what, self.root):
                for folder in (self._partial, self._locks):
                    folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self._locks / key, busy))
            yield

    def _take(self, key: str) -> int:
        """Remove an engine, whole at once; returns its bytes, 0 where there is none. For the holder of its lock."""
        if not self._has(key):
            return 0
        aside = self._aside(key)
        os.rename(self.root / key, aside)
        return remove(aside)

    def _clear(self, key: str) -> int:
        """Remove what killed processes left of `key`; returns the bytes freed. For the holder of its lock."""
        return sum(remove(leftover) for leftover in self._partial.glob(f"{key}.*"))

    def _sweep(self) -> int:
        """Remove what killed processes left, of every key that nobody holds; returns the bytes freed."""
        freed = 0
        keys = {leftover.name.partition(".")[0] for leftover in self._partial.glob("*")}
        for key in sorted(filter(_KEY.fullmatch, keys)):
            with suppress(_Busy), self._holding(key, f"cannot remove {self._partial / key}"):
                freed += self._clear(key)
        return freed

    def _aside(self, key: str) -> Path:
        return self._partial / f"{key}.{secrets.token_hex(4)}"

    def _keys(self) -> tuple[str, ...]:
        """Keys of all that is in an engine's place, whole or not; raises EngineError where the folder is unreadable."""
        with explained(f"cannot read the engines in {self.root}", self.root):
            try:
                return tuple(sorted(name for name in os.listdir(self.root) if _KEY.fullmatch(name)))
            except FileNotFoundError:
                return ()

    def _has(self, key: str) -> bool:
        return _KEY.fullmatch(key) is not None and os.path.lexists(self.root / key)

    def _age(self, key: str) -> timedelta:
        now = datetime.now(UTC)
        try:
            return now - datetime.fromisoformat(Manifest.read(self.root / key).created)
        except ValueError:
            return now - datetime.fromtimestamp((self.root / key).lstat().st_mtime, UTC)

    def _damaged(self, name: str, problem: str) -> EngineError:
        todo = "mend it with dfkd-engines build"
        return EngineError(f"the engine {name} in {self.root} is damaged", problem, todo)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
