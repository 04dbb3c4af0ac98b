"""Errors of a disk in words."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dfkd_engine.errors import EngineError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_FOLDER = {errno.EEXIST, errno.ENOTDIR}
# What a compiler's own files can meet as well; other errors of a compiler speak for themselves.
_OF_THE_DISK = {*_FULL, errno.EROFS, errno.EFBIG, errno.EIO}

# Less than this and nothing of an engine fits: then a compiler's error, whatever it says, comes from the disk.
_NOTHING_FITS = 1 << 20


@contextmanager
def explained(what: str, folder: Path) -> Iterator[None]:
    """Turn an OSError into EngineError: ``what``, the system's reason with the file, and what to do about it."""
    try:
        yield
    except OSError as error:
        raise disk_error(what, folder, error) from error


def disk_error(what: str, folder: Path, error: OSError) -> EngineError:
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


@contextmanager
def compiler_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn what a compiler raises into EngineError where the disk is the cause; all else passes as it is."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise disk_error(what, folder, error) from error
        free = free_bytes(folder)
        if free is not None and free < _NOTHING_FITS:
            why = (
                f"{free} bytes are left where {folder} lies, and the compiler stopped ({type(error).__name__}: {error})"
            )
            raise EngineError(what, why, "make room, for instance with dfkd-engines prune, then run again") from error
        raise


def free_bytes(folder: Path) -> int | None:
    """Bytes that are free where ``folder`` lies or would lie; None where the system does not say."""
    for place in (folder, *folder.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None
