"""Folders that can be written and have one writer; JSON objects of a known shape, and the settings.json of a run."""

import errno
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import dfkd
from dfkd.config import Config, plain
from dfkd.errors import UsageError
from dfkd_engine.files import PARTIAL, locked, remove_partials, replace_file, replace_text, sha256

__all__ = [
    "PARTIAL",
    "checked_object",
    "folder_lock",
    "locked",
    "make_writable",
    "read_object",
    "remove_partials",
    "replace_file",
    "replace_text",
    "save_settings",
    "sha256",
    "system_fault",
]


def make_writable(folder: Path) -> None:
    """Create the folder where needed and prove that files can be made in it; raises UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # has no name, so that a kill leaves nothing behind
    except OSError as error:
        why = error.strerror or str(error)
        raise UsageError(f"cannot write to {folder}", why, "choose a folder that can be written with --out") from None


_ADVICE = {
    "make room": (errno.ENOSPC, errno.EDQUOT),
    "choose a place that can be read and written, or change its permissions": (errno.EACCES, errno.EPERM, errno.EROFS),
    "raise the limit (ulimit -n for open files, ulimit -f for their size)": (errno.EMFILE, errno.ENFILE, errno.EFBIG),
}


def system_fault(error: OSError) -> UsageError:
    """What the system refused, in words: the file as far as it is known, the reason, and what to do."""
    named = error.filename2 or error.filename
    what = f"cannot use {named}" if named else "a file could not be used"
    todo = next((text for text, numbers in _ADVICE.items() if error.errno in numbers), "see to it")
    return UsageError(what, error.strerror or str(error), f"{todo}, then start again: what is finished stays")


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder/.lock`; raises UsageError while another process holds it."""

    def refuse(owner: str) -> NoReturn:
        raise UsageError(
            f"{folder} is in use", f"process {owner} is writing to it", "wait for it or choose another --out"
        )

    with locked(folder / ".lock", refuse):
        yield


def read_object(path: Path, shape: Mapping[Any, Any], todo: str, needed: Collection[str] = ()) -> dict[str, Any]:
    """A JSON object from a file, each of whose entries, where it is there, has the shape that is given for its key.

    needed: keys that must be there. shape: by key, such as {"images": int, "class_names": [str], "baselines": {...:
    {"accuracy": (float, None)}}}: str, int, float (also of whole numbers), [shape] for a list, {key: shape} for an
    object, with ... for every key that is not named, None for null, and a tuple for one of several. Keys of other names
    hold anything.
    Raises UsageError, which ends with `todo`: the file cannot be read, is not JSON, or is of another shape.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}", error.strerror or str(error), todo) from None
    except (ValueError, RecursionError) as error:  # also JSONDecodeError and UnicodeDecodeError
        raise UsageError(f"{path} is not JSON", str(error), todo) from None
    return checked_object(value, shape, str(path), todo, needed)


def checked_object(
    value: Any, shape: Mapping[Any, Any], what: str, todo: str = "", needed: Collection[str] = ()
) -> dict[str, Any]:
    """`value`, which was read as JSON from `what`; arguments and errors as of `read_object`."""
    fault = _misfit(value, shape, "")
    if not fault and (absent := [key for key in needed if key not in value]):
        fault = f"it does not say '{absent[0]}'"
    if fault:
        raise UsageError(f"{what} cannot be used", fault, todo)
    found: dict[str, Any] = value
    return found


_KINDS = {str: "text", int: "a whole number", float: "a number"}


def _misfit(value: Any, shape: Any, where: str) -> str:
    """The first place in `value` that is of another shape, in words; "" where there is none."""
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(shape, tuple):
        faults = [_misfit(value, one, where) for one in shape]
        return faults[0] if all(faults) else ""
    if isinstance(shape, list):
        wanted, fits = "a list", isinstance(value, list)
        parts = [(item, shape[0], f"{where}[{place}]") for place, item in enumerate(value if fits else ())]
    elif isinstance(shape, dict):
        wanted, fits = "an object", isinstance(value, dict)
        named = {key: shape.get(key, shape.get(...)) for key in (value if fits else ())}
        parts = [(value[key], one, f"{where}.{key}".lstrip(".")) for key, one in named.items() if one is not None]
    elif shape is None:
        wanted, fits = "null", value is None
    else:
        wanted = _KINDS[shape]
        fits = isinstance(value, int | float if shape is float else shape) and not isinstance(value, bool)
    if not fits:
        shown = json.dumps(value)
        return f"{where or 'it'} is {shown if len(shown) <= 40 else shown[:37] + '...'}, wanted is {wanted}"
    return next((fault for part in parts if (fault := _misfit(*part))), "")


def save_settings(config: Config, folder: Path, command: str, name: str = "settings.json") -> Path:
    """Write folder/NAME: the command, every option by flat name, and the versions behind them.

    name: another one where the folder may be another command's. The text follows from the values alone, not from how
    they were given; `--config` of the command takes it back.
    """
    versions = {"dfkd": dfkd.__version__, **{package: version(package) for package in ("diffusers", "torch")}}
    settings = {"command": command, "options": plain(config.flat()), "versions": versions}
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(path := folder / name, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return path
