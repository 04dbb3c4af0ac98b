"""Digests of what a graph is made of: weight files, and the project's own source. No torch is needed."""

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).parents[2]  # the folder that holds engine/ and dfkd/, in a checkout and in site-packages


class FileDigests:
    """SHA-256 of files, remembered by path, size and time of change: a prior's gigabytes are read once.

    A memory that is lost or damaged costs time and nothing else. Whoever loads an engine compares what it holds with
    the networks in memory, so a file that was changed under the same size and time is found then.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        try:
            self._known: dict[str, list[object]] = dict(json.loads(memory.read_text()))
        except (OSError, ValueError, TypeError):
            self._known = {}
        self._changed = False

    def of(self, file: Path) -> str:
        """Hexadecimal digest of a file's bytes. Raises OSError."""
        status = file.stat()
        name, mark = str(file.resolve()), [status.st_size, status.st_mtime_ns]
        found = self._known.get(name)
        if isinstance(found, list) and found[:2] == mark and len(found) == 3:
            return str(found[2])
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self._known[name] = [*mark, digest]
        self._changed = True
        return digest

    def save(self) -> None:
        """Keep what was learnt; a folder that cannot be written is left alone (the digests are only slower then)."""
        if not self._changed or not self._memory.parent.is_dir():
            return
        beside = self._memory.with_name(self._memory.name + ".partial")
        try:
            beside.write_text(json.dumps(self._known))
            beside.replace(self._memory)
        except OSError:
            beside.unlink(missing_ok=True)


def of_files(root: Path, files: Iterable[Path], digests: FileDigests) -> str:
    """One digest of several files: their names below `root` and their bytes."""
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(f"{file.relative_to(root).as_posix()} {digests.of(file)}\n".encode())
    return total.hexdigest()


def of_values(values: Mapping[str, object]) -> str:
    """One digest of plain JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def of_sources(*places: str) -> str:
    """One digest of the project's modules at `places` (files, or folders with all below), as they are parsed.

    Comments, docstrings and layout do not count.
    """
    total = hashlib.sha256()
    for place in places:
        path = PROJECT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            status = file.stat()
            code = _code(file, status.st_size, status.st_mtime_ns)
            total.update(f"{file.relative_to(PROJECT).as_posix()} {code}\n".encode())
    return total.hexdigest()


@cache
def _code(file: Path, size: int, changed: int) -> str:
    """A module as it is parsed, without docstrings; parsed once a process for the networks and backends that ask."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return ast.dump(tree)
