"""One value of one option: from text, TOML or a preset to its declared type, checked against its bounds.

Types: int, float, str, bool, Path, ``X | None`` and ``tuple[str, ...]``. Text "none" is None where None is allowed,
because TOML and the command line have no other way to take back what a preset has set.
"""

import math
import types
from dataclasses import Field
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from dfkd.errors import UsageError


def split_optional(kind: Any) -> tuple[Any, bool]:
    """``X | None`` -> (X, True); anything else -> (itself, False)."""
    if get_origin(kind) in (types.UnionType, Union):
        members = [member for member in get_args(kind) if member is not type(None)]
        if len(members) != 1 or len(members) == len(get_args(kind)):
            raise TypeError(f"options may be X or X | None, not {kind}")
        return members[0], True
    return kind, False


def convert(value: object, kind: Any, source: str) -> Any:
    """``value`` as ``kind``; ``source`` names its origin in the UsageError for a value that does not fit."""
    inner, optional = split_optional(kind)
    if optional and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    converter = _CONVERTERS.get(inner)
    if converter is None:
        raise TypeError(f"{source}: options of type {kind} are not supported")
    try:
        return converter(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{source} is {value!r}", str(error)) from None


def check(value: Any, field: "Field[Any]", source: str) -> None:
    """Raise UsageError unless ``value`` is within the field's range and among its choices."""
    if value is None:
        return
    choices, low, high = (field.metadata.get(key) for key in ("choices", "low", "high"))
    for item in value if isinstance(value, tuple) else (value,):
        if choices is not None and item not in choices:
            raise UsageError(f"{source} is {item!r}", "it must be one of " + ", ".join(map(str, choices)))
    if low is not None and value < low:
        raise UsageError(f"{source} is {value}", f"it must be at least {low}")
    if high is not None and value > high:
        raise UsageError(f"{source} is {value}", f"it must be at most {high}")


def _to_int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError("it must be a whole number")
    try:
        return int(value)
    except ValueError:
        raise ValueError("it must be a whole number") from None


def _to_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError("it must be a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("it must be a number") from None
    if not math.isfinite(number):
        raise ValueError("it must be a finite number")
    return number


def _to_bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("it must be true or false")
    return value


def _to_str(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("it must be text")
    return value


def _to_path(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("it must be a path")
    return Path(value).expanduser()


def _to_names(value: object) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise TypeError("it must be names, separated by commas or in a list")
    return tuple(part.strip() for part in parts if part.strip())


_CONVERTERS = {
    int: _to_int,
    float: _to_float,
    bool: _to_bool,
    str: _to_str,
    Path: _to_path,
    tuple[str, ...]: _to_names,
}
