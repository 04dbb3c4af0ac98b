"""The folder of an `EngineStore`: who may change what in it, and how engines come and go whole.

<key>/       one engine          recipes/   links to engines
partial/     engines under construction or removal, each named <key>.<something>; whoever holds the key's lock may
             remove what lies there under that key, for it is a killed process's
locks/       one file per engine that is being changed
"""

import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dfkd_engine.files import locked, remove, sync_folder
from dfkd_engine.storage.disk import disk_error, explained

KEY = re.compile(r"[0-9a-f]{24}")


class Busy(Exception):
    """Another process holds the lock."""


@dataclass(frozen=True)
class StoreFolder:
    """root: the folder; it need not exist to be read. say: gets one line where another process is waited for."""

    root: Path
    say: Callable[[str], object]

    @property
    def recipes(self) -> Path:
        return self.root / "recipes"

    @property
    def partial(self) -> Path:
        return self.root / "partial"

    def engines(self) -> tuple[str, ...]:
        """Keys of all that is in an engine's place, whole or not; raises EngineError where the folder is unreadable."""
        try:
            return tuple(sorted(name for name in os.listdir(self.root) if KEY.fullmatch(name)))
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise disk_error(f"cannot read the engines in {self.root}", self.root, error) from error

    def has(self, key: str) -> bool:
        return KEY.fullmatch(key) is not None and os.path.lexists(self.root / key)

    @contextmanager
    def holding(self, name: str, what: str, label: str | None = None) -> Iterator[None]:
        """Hold the lock ``name``, making the store's folders first.

        label: what the line that tells of a wait says is being worked on; "" waits without a line, None raises `Busy`
        instead. A disk that refuses raises EngineError(what, ...).
        """

        def busy(owner: str) -> None:
            if label is None:
                raise Busy
            if label:
                self.say(f"waiting for process {owner}, which is at work on {label}")

        locks = self.root / "locks"
        with ExitStack() as stack:
            with explained(what, self.root):
                for folder in (self.recipes, self.partial, locks):
                    folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(locks / name, busy))
            yield

    # for the holder of the key's lock

    def new_place(self, key: str) -> Path:
        """An empty folder to build in. Its name is new: a killed builder's compiler may still write to the last one."""
        place = self._aside(key)
        place.mkdir()
        return place

    def put(self, place: Path, key: str) -> None:
        """Put a complete engine in its place, instead of the damaged one there."""
        self.take(key)  # killed after this, the place is empty: a miss, which the next build fills
        os.rename(place, self.root / key)
        sync_folder(self.root)

    def take(self, key: str) -> int:
        """Remove an engine, whole at once; returns its bytes, 0 where there is none."""
        if not self.has(key):
            return 0
        aside = self._aside(key)
        os.rename(self.root / key, aside)
        return remove(aside)

    def clear(self, key: str) -> int:
        """Remove what killed processes left of ``key``; returns the bytes freed."""
        return sum(remove(leftover) for leftover in self.partial.glob(f"{key}.*"))

    # for everyone

    def sweep(self) -> int:
        """Remove what killed processes left, of every key that nobody holds; returns the bytes freed."""
        freed = 0
        keys = {leftover.name.partition(".")[0] for leftover in self.partial.iterdir()}
        for key in sorted(filter(KEY.fullmatch, keys)):
            with suppress(Busy), self.holding(key, f"cannot remove {self.partial / key}"):
                freed += self.clear(key)
        return freed

    def _aside(self, key: str) -> Path:
        return self.partial / f"{key}.{secrets.token_hex(4)}"
