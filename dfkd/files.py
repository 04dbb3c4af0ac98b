"""Folders that can be written and have one writer, and the settings.json in them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import dfkd
from dfkd.config import Config, plain
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
    "save_settings",
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
    """Hold `folder/.lock`; raises UsageError while another process holds it."""

    def refuse(owner: str) -> NoReturn:
        raise UsageError(
            f"{folder} is in use", f"process {owner} is writing to it", "wait for it or choose another --out"
        )

    with locked(folder / ".lock", refuse):
        yield


def save_settings(config: Config, folder: Path, command: str) -> Path:
    """Write folder/settings.json: the command, every option by flat name, and the versions behind them.

    The text follows from the values alone, not from how they were given; `--config` of the command takes it back.
    """
    versions = {"dfkd": dfkd.__version__, **{package: version(package) for package in ("diffusers", "torch")}}
    settings = {"command": command, "options": plain(config.flat()), "versions": versions}
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(path := folder / "settings.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return path
