"""Compiled engines on disk, named by what they are made of: whole or absent, and hashed before they are loaded.

Layout of the folder:

    <key>/manifest.json, <key>/payload/   one engine; the key is EngineSpec.key()
    recipes/<digest>.json                 recipe -> key: a cache, written anew by the next build
    partial/, locks/                      see `StoreFolder`

One process builds an engine, others that want it wait for that one. Nothing here imports torch.
"""

import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from dfkd_engine.errors import EngineError
from dfkd_engine.files import replace_text
from dfkd_engine.spec import ABSENT, EngineSpec, differing
from dfkd_engine.storage import recipe_links
from dfkd_engine.storage.disk import compiler_errors, explained
from dfkd_engine.storage.folder import KEY, Busy, StoreFolder
from dfkd_engine.storage.manifest import MANIFEST, Manifest, plain_facts, read_manifest
from dfkd_engine.storage.payload import damage, record

Make = Callable[[Path], Mapping[str, Any]]
Difference = tuple[str, str, str]  # field, there, here
Differences = list[Difference]


class Verdict(NamedTuple):
    """key, network ("?" where nothing tells), and what is wrong with the engine; None: nothing."""

    key: str
    network: str
    problem: str | None


Verdicts = list[Verdict]


class EngineStore:
    """The engines below ``root``; reading creates nothing.

    say: gets one line where another process is waited for; without it the line goes to stderr.
    """

    def __init__(self, root: Path, say: Callable[[str], object] | None = None) -> None:
        self.root = Path(root)
        self._folder = StoreFolder(self.root, say if say is not None else _to_stderr)

    # reading

    def find(self, recipe: Mapping[str, str]) -> Manifest | None:
        """The engine that exactly this recipe led to; None: unknown, removed, or its manifest cannot be used.

        Quick: two small files are read, no payload. Raises EngineError for a folder that may not be read.
        """
        recipe_links.check_recipe(recipe)
        with explained(f"cannot read the engines in {self.root}", self.root):
            key = recipe_links.follow(self._folder.recipes, recipe)
        if key is None or not self._folder.has(key):
            return None
        try:
            manifest = read_manifest(self.root / key)
        except ValueError:
            return None  # `payload`, `problem` and `verify` say why; a build mends it
        return None if recipe_links.contradictions(recipe, manifest.spec) else manifest

    def get(self, key: str) -> Manifest | None:
        """The engine of this key, None where there is none; raises EngineError where its manifest is damaged."""
        if not KEY.fullmatch(key):
            raise EngineError(f"{key!r} is no engine's key", "it has 24 hexadecimal digits", "see dfkd-engines list")
        if not self._folder.has(key):
            return None
        try:
            return read_manifest(self.root / key)
        except ValueError as error:
            raise self._damaged(key, str(error)) from None

    def payload(self, manifest: Manifest) -> Path:
        """The folder of the engine's files, every one verified by size and SHA-256; whoever loads them writes nothing.

        The second call of a process hashes no more, unless a file has changed. Raises EngineError for damage, or where
        the engine is not the one in this store.
        """
        stored = self.get(manifest.key)
        if stored is None:
            raise self._missing(str(manifest))
        folder = self.root / manifest.key / "payload"
        if (problem := damage(folder, stored.files)) is not None:
            raise self._damaged(str(manifest), problem)
        return folder

    def problem(self, key: str) -> str | None:
        """What is wrong with the engine of this key, hashing its files where that was not done yet; None: nothing."""
        if not self._folder.has(key):
            return "it is missing"
        try:
            manifest = read_manifest(self.root / key)
        except ValueError as error:
            return str(error)
        return damage(self.root / key / "payload", manifest.files)

    def list(self) -> tuple[Manifest, ...]:
        """Every engine whose manifest can be read, by network and age; `verify` names the others."""
        found = []
        for key in self._folder.engines():
            with suppress(ValueError):
                found.append(read_manifest(self.root / key))
        return tuple(sorted(found, key=lambda manifest: (manifest.spec.network, manifest.created, manifest.key)))

    def verify(self) -> Verdicts:
        """Every engine with what is wrong with it, by network and key; each file is hashed."""
        with explained(f"cannot read the engines in {self.root}", self.root):
            networks = {key: recipe["network"] for _, recipe, key in recipe_links.links(self._folder.recipes)}
        networks |= {manifest.key: manifest.spec.network for manifest in self.list()}
        verdicts = [Verdict(key, networks.get(key, "?"), self.problem(key)) for key in self._folder.engines()]
        return sorted(verdicts, key=lambda verdict: (verdict.network, verdict.key))

    def alike(self, recipe: Mapping[str, str], field: str) -> tuple[Manifest, ...]:
        """Whole engines whose recipe differs from this one in ``field`` alone, the newest first."""
        recipe_links.check_recipe(recipe)
        with explained(f"cannot read the engines in {self.root}", self.root):
            links = tuple(recipe_links.links(self._folder.recipes))
        keys = {key for _, other, key in links if [name for name, *_ in differing(other, recipe)] == [field]}
        found = [m for m in self.list() if m.key in keys and self.problem(m.key) is None]
        return tuple(sorted(found, key=lambda manifest: manifest.created, reverse=True))

    def nearest(self, recipe: Mapping[str, str]) -> tuple[Mapping[str, str], Manifest] | None:
        """Of the recipes for the same network that lead to an engine, the one with the fewest differing fields.

        Among equals the newest engine. None where the network has no engine.
        """
        recipe_links.check_recipe(recipe)
        engines = {manifest.key: manifest for manifest in self.list()}
        with explained(f"cannot read the engines in {self.root}", self.root):
            known = [
                (other, engines[key]) for _, other, key in recipe_links.links(self._folder.recipes) if key in engines
            ]
        near = [(other, manifest) for other, manifest in known if other["network"] == recipe["network"]]
        near.sort(key=lambda pair: (pair[1].created, pair[1].key), reverse=True)
        return min(near, key=lambda pair: len(differing(pair[0], recipe)), default=None)

    def explain(self, recipe: Mapping[str, str]) -> Differences:
        """Why no engine matches, as (field, in the nearest recipe, in this one); [] where one does.

        A recipe whose engine is gone or damaged differs in the field "engine"; a network without engines in "network".
        """
        recipe_links.check_recipe(recipe)
        with explained(f"cannot read the engines in {self.root}", self.root):
            key = recipe_links.follow(self._folder.recipes, recipe)
        if key is not None:
            there = self.problem(key) if KEY.fullmatch(key) else "its link is damaged"
            manifest = self.find(recipe)
            if there is None and manifest is not None:
                return []
            return [("engine", there or "it was built for another recipe", key)]
        found = self.nearest(recipe)
        return [("network", ABSENT, recipe["network"])] if found is None else differing(found[0], recipe)

    # writing

    def build(self, spec: EngineSpec, recipe: Mapping[str, str], make: Make) -> Manifest:
        """The engine of ``spec``, made where it is missing or damaged, and found by ``recipe`` from now on.

        make(folder) writes the payload into an empty folder and returns what it measured, as plain JSON. Where another
        process builds the same engine, that one is awaited and its engine taken. A damaged engine stays until its
        successor is whole. Whatever make raises passes through, and nothing remains of its files; a full, read-only or
        failing disk raises EngineError.
        """
        key, name = spec.key(), f"{spec.network} {spec.key()}"
        _check_agrees(recipe, spec)
        what = f"cannot write the engine {name} to {self.root}"
        with self._folder.holding(key, what, label=f"the engine {name}"):
            with explained(what, self.root):
                self._folder.clear(key)
            with suppress(OSError, EngineError):  # room only: leftovers of another's engines may be another's files
                self._folder.sweep()
            if self.problem(key) is not None:
                self._make(spec, make, what)
            self._link(recipe, key, what)
            return read_manifest(self.root / key)

    def adopt(self, recipe: Mapping[str, str], key: str) -> Manifest:
        """Let another recipe lead to an engine that exists: its graph is equal though its sources changed.

        Raises EngineError where there is no such engine, it contradicts the recipe, or the disk refuses.
        """
        manifest = self.get(key)
        if manifest is None:
            raise self._missing(key)
        _check_agrees(recipe, manifest.spec)
        self._link(recipe, key, f"cannot link the engine {manifest} in {self.root}")
        return manifest

    def prune(self, keep: Collection[str], older_than: timedelta | None = None) -> int:
        """Remove engines that are neither in ``keep`` nor younger than ``older_than``; returns the bytes freed.

        Recipes that lead nowhere go too, and what killed processes left. An engine that is being built stays.
        """
        if not self.root.is_dir():
            return 0
        freed, what = 0, f"cannot remove engines from {self.root}"
        for key in self._folder.engines():
            with suppress(Busy), self._folder.holding(key, what), explained(what, self.root):
                if key not in keep and self._folder.has(key) and (older_than is None or self._age(key) >= older_than):
                    freed += self._folder.take(key)
        with explained(what, self.root):
            freed += self._folder.sweep()
            with self._folder.holding("recipes", what, label=""):
                return freed + recipe_links.drop_dead(self._folder.recipes, self._folder.has)

    def _make(self, spec: EngineSpec, make: Make, what: str) -> None:
        with explained(what, self.root):
            place = self._folder.new_place(spec.key())
        try:
            folder = place / "payload"
            with explained(what, self.root):
                folder.mkdir()
            with compiler_errors(what, self.root):
                facts = plain_facts(make(folder))
            with explained(what, self.root):
                created = datetime.now(UTC).isoformat(timespec="seconds")
                manifest = Manifest(spec.key(), spec, record(folder), facts, created)
                replace_text(place / MANIFEST, manifest.to_text())
                self._folder.put(place, spec.key())
        finally:
            shutil.rmtree(place, ignore_errors=True)  # what cannot be removed now, the next build sweeps

    def _link(self, recipe: Mapping[str, str], key: str, what: str) -> None:
        with self._folder.holding("recipes", what, label=""), explained(what, self.root):
            recipe_links.link(self._folder.recipes, recipe, key)

    def _age(self, key: str) -> timedelta:
        now = datetime.now(UTC)
        try:
            return now - datetime.fromisoformat(read_manifest(self.root / key).created)
        except ValueError:
            return now - datetime.fromtimestamp((self.root / key).lstat().st_mtime, UTC)

    def _damaged(self, name: str, problem: str) -> EngineError:
        todo = "mend it with dfkd-engines build"
        return EngineError(f"the engine {name} in {self.root} is damaged", problem, todo)

    def _missing(self, name: str) -> EngineError:
        todo = "build it with dfkd-engines build"
        return EngineError(f"the engine {name} is missing", f"{self.root} does not hold it", todo)


def _check_agrees(recipe: Mapping[str, str], spec: EngineSpec) -> None:
    recipe_links.check_recipe(recipe)
    if wrong := recipe_links.contradictions(recipe, spec):
        why = "; ".join(f"{field} is {asked} in the recipe and {made} in the engine" for field, asked, made in wrong)
        raise EngineError(f"the recipe does not fit the engine {spec.network} {spec.key()}", why, "correct it")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
