"""The files of an engine against the manifest that describes them.

Compiled code is code: every byte is hashed before it is loaded for the first time in a process. Afterwards the kernel's
record of each file (inode, size, times of change) tells whether it is still the file that was hashed.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dfkd_engine.errors import EngineError
from dfkd_engine.files import sha256, sync_file, sync_folder

_Stamp = tuple[int, ...]
_verified: dict[str, tuple[dict[str, str], dict[str, _Stamp]]] = {}


@dataclass(frozen=True)
class FileRecord:
    """sha256: 64 hexadecimal digits of the file's bytes. bytes: its size."""

    sha256: str
    bytes: int


def record(folder: Path) -> dict[str, FileRecord]:
    """Flush every file under ``folder`` to the disk; relative path (with "/") -> what it holds, sorted.

    Raises EngineError where there is no file, a link or anything else that is not a plain file; OSError of the disk.
    """
    found, problem = _scan(folder)
    if problem is None and not found:
        problem = "no file was written"
    if problem is not None:
        raise EngineError(f"the new engine in {folder} cannot be kept", problem, "correct the backend's compile")
    for name in found:
        sync_file(folder / name)
    for inner in sorted(path for path in folder.rglob("*") if path.is_dir()):
        sync_folder(inner)
    sync_folder(folder)
    return {name: FileRecord(sha256(folder / name), (folder / name).stat().st_size) for name in sorted(found)}


def damage(folder: Path, files: Mapping[str, FileRecord]) -> str | None:
    """What is wrong with the files under ``folder``, as a phrase; None where they are exactly those on record."""
    try:
        found, problem = _scan(folder)
        if problem is None:
            problem = _listing_damage(found, files)
        if problem is not None:
            return problem
        place, hashes = str(folder.absolute()), {name: file.sha256 for name, file in files.items()}
        if _verified.get(place) == (hashes, found):
            return None
        for name, file in files.items():
            if sha256(folder / name) != file.sha256:
                return f"{name} was altered: its SHA-256 is not the one on record"
        _verified[place] = (hashes, found)
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror or error})"
    return None


def _listing_damage(found: Mapping[str, _Stamp], files: Mapping[str, FileRecord]) -> str | None:
    if missing := sorted(files.keys() - found.keys()):
        return f"{missing[0]} is missing"
    if extra := sorted(found.keys() - files.keys()):
        return f"{extra[0]} does not belong to it"
    for name, file in files.items():
        size = found[name][2]
        if size != file.bytes:
            return f"{name} has {size} bytes, on record are {file.bytes}"
    return None


def _scan(folder: Path) -> tuple[dict[str, _Stamp], str | None]:
    """Every plain file under ``folder`` with its stamp (device, inode, bytes, times), and what else lies there."""
    found: dict[str, _Stamp] = {}
    if folder.is_symlink() or not folder.is_dir():
        return found, f"{folder.name} is {'a link' if folder.is_symlink() else 'no folder'}"
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                name = Path(entry.path).relative_to(folder).as_posix()
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISLNK(status.st_mode):
                    return found, f"{name} is a link"
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(Path(entry.path))
                elif stat.S_ISREG(status.st_mode):
                    times = (status.st_mtime_ns, status.st_ctime_ns)
                    found[name] = (status.st_dev, status.st_ino, status.st_size, *times)
                else:
                    return found, f"{name} is no plain file"
    return found, None
