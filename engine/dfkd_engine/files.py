"""Files that are whole or absent, digests of files, locks between processes, and a disk's errors in words."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dfkd_engine.errors import EngineError, first_line

PARTIAL = ".partial"

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_FOLDER = {errno.EEXIST, errno.ENOTDIR}
# What a compiler's own files can meet as well; other errors of a compiler speak for themselves.
_OF_THE_DISK = {*_FULL, errno.EROFS, errno.EFBIG, errno.EIO}
# Less than this and nothing of an engine fits: then a compiler's error, whatever it says, comes from the disk.
_NOTHING_FITS = 1 << 20

Stamp = tuple[int, ...]
_known: dict[Stamp, str] = {}


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside `path`, flush to the disk, rename over it: a crash leaves the old file or the new one.

    A failure leaves the old file and nothing beside it; an OSError names the file.
    """
    beside = path.with_name(path.name + PARTIAL)
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and error.filename is None:  # of a write, which knows no name
            error.filename = str(path)
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
    """Hexadecimal SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """`sha256`, remembered in this process for as long as the kernel's record says that the file was not touched."""
    mark = stamp(path.stat())
    if mark not in _known:
        _known[mark] = sha256(path)
    return _known[mark]


def stamp(status: os.stat_result) -> Stamp:
    """What changes when a file does: device, inode, size and both times of change."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextmanager
def locked(path: Path, on_busy: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `path`, between processes and between threads.

    Where another holds it, `on_busy(process id, or "?")` is called once: it may raise, or return to wait. The kernel
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


@contextmanager
def explained(what: str, folder: Path) -> Iterator[None]:
    """Turn an OSError into EngineError: `what`, the system's reason with the file, and what to do about it."""
    try:
        yield
    except OSError as error:
        raise _disk_error(what, folder, error) from error


@contextmanager
def compiler_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn whatever is raised into EngineError where the disk is the cause; all else passes as it is."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in _OF_THE_DISK:
            raise _disk_error(what, folder, cause) from error
        free = free_bytes(folder)
        if free is not None and free < _NOTHING_FITS:
            why = f"{free} bytes are left where {folder} lies, and the compiler stopped ({first_line(error)})"
            raise EngineError(what, why, "make room, for instance with dfkd-engines prune, then run again") from error
        raise


def free_bytes(folder: Path) -> int | None:
    """Bytes that are free where `folder` lies or would lie; None where the system does not say."""
    for place in (folder, *folder.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None


def _disk_error(what: str, folder: Path, error: OSError) -> EngineError:
    why = error.strerror or str(error)
    if error.filename is not None:
        why += f" ({error.filename})"
    if error.errno in _FULL:
        free = free_bytes(folder)
        left = "" if free is None else f", {free / 1e6:.1f} MB are left where {folder} lies"
        return EngineError(what, why + left, "make room, for instance with dfkd-engines prune, then run again")
    if error.errno in _REFUSED:
        return EngineError(what, why, "make the folder writable or choose another one for the engines")
    if error.errno in _NO_FOLDER:
        return EngineError(what, why, "choose a folder for the engines that is one, or can be made")
    if error.errno == errno.EFBIG:
        return EngineError(what, why, "raise the limit of file sizes (ulimit -f, or the file system's), then run again")
    return EngineError(what, why, "see to the disk, then run again")
