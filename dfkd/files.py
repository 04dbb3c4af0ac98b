"""Files that are whole or absent, and a folder that has one writer."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dfkd.errors import UsageError

PARTIAL = ".partial"


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside ``path``, flush to the disk, rename over it: a crash leaves the old file or the new one."""
    beside = path.with_name(path.name + PARTIAL)
    with open(beside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself is on the disk only now
    finally:
        os.close(folder)


def replace_text(path: Path, text: str) -> None:
    replace_file(path, lambda file: file.write(text.encode()))


def remove_partials(folder: Path) -> None:
    """Delete what a killed writer left; only the holder of the folder's lock may call it."""
    for leftover in folder.glob("*" + PARTIAL):
        leftover.unlink()


def make_writable(folder: Path) -> None:
    """Create the folder where needed and prove that files can be made in it; raises UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"probe-{os.getpid()}{PARTIAL}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        why = error.strerror or str(error)
        raise UsageError(f"cannot write to {folder}", why, "choose a folder that can be written with --out") from None


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold ``folder/.lock``; raises UsageError while another process holds it.

    The kernel frees the lock when its process ends, however it ends, so a stale file is simply taken over.
    """
    path = folder / ".lock"
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(file, 32).decode(errors="replace").strip()
            os.close(file)
            raise UsageError(
                f"{folder} is in use", f"process {owner or '?'} is writing to it", "wait for it or choose another --out"
            ) from None
        # The former holder may have deleted the file between our open and our lock.
        if path.exists() and os.fstat(file).st_ino == path.stat().st_ino:
            break
        os.close(file)
    try:
        os.ftruncate(file, 0)
        os.write(file, str(os.getpid()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)
