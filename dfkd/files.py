"""Folders that can be written and have one writer; whole-or-absent files come from engine/files.py."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from dfkd.errors import UsageError
from dfkd_engine.files import PARTIAL, locked, remove_partials, replace_file, replace_text, sha256

__all__ = [
    "PARTIAL",
    "folder_lock",
    "locked",
    "make_writable",
    "remove_partials",
    "replace_file",
    "replace_text",
    "sha256",
]


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
    """Hold ``folder/.lock``; raises UsageError while another process holds it."""

    def refuse(owner: str) -> NoReturn:
        raise UsageError(
            f"{folder} is in use", f"process {owner} is writing to it", "wait for it or choose another --out"
        )

    with locked(folder / ".lock", refuse):
        yield
