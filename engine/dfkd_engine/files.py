"""Files that are whole or absent, and locks between processes that the kernel frees when their holder dies."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside ``path``, flush to the disk, rename over it: a crash leaves the old file or the new one.

    A failure leaves the old file and nothing beside it.
    """
    beside = path.with_name(path.name + PARTIAL)
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    sync_folder(path.parent)  # the rename itself is on the disk only now


def replace_text(path: Path, text: str) -> None:
    replace_file(path, lambda file: file.write(text.encode()))


def remove_partials(folder: Path) -> None:
    """Delete what a killed writer left; only the holder of the folder's lock may call it."""
    for leftover in folder.glob("*" + PARTIAL):
        leftover.unlink()


def remove(path: Path) -> int:
    """Delete a file, a link (not its target) or a folder with all that it holds; returns the bytes of its files."""
    if path.is_symlink() or not path.is_dir():
        size = path.lstat().st_size
        path.unlink()
        return size
    size = sum(inner.lstat().st_size for inner in path.rglob("*") if not inner.is_dir())
    shutil.rmtree(path)
    return size


def sync_folder(folder: Path) -> None:
    """Put on the disk which names the folder holds."""
    sync_file(folder)


def sync_file(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, on_busy: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file ``path``, between processes and between threads.

    Where another holds it, ``on_busy(process id, or "?")`` is called once: it may raise, or return to wait. The kernel
    frees the lock when its process ends, however it ends, so a stale file is simply taken over.
    """
    told = False
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    told = True
                    on_busy(os.read(file, 32).decode(errors="replace").strip() or "?")
                fcntl.flock(file, fcntl.LOCK_EX)
            # The former holder may have deleted the file between our open and our lock.
            if _is_open_file(path, file):
                break
        except BaseException:
            os.close(file)
            raise
        os.close(file)
    try:
        # The number only serves the message of who waits: a full disk must not keep anyone from the lock.
        with suppress(OSError):
            os.ftruncate(file, 0)
            os.write(file, str(os.getpid()).encode())
        yield
    finally:
        with suppress(OSError):  # a file that stays is taken over, and must not hide the error that is on its way
            path.unlink(missing_ok=True)
        fcntl.flock(file, fcntl.LOCK_UN)  # a forked child may still have the file open
        os.close(file)


def _is_open_file(path: Path, file: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(file).st_ino
    except FileNotFoundError:
        return False
