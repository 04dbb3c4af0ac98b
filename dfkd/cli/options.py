"""A command's options are one frozen dataclass: flags, presets, TOML keys, help and checks all derive from it.

    @dataclass(frozen=True)
    class Options:
        '''What the command does (shown by --help).'''
        out: Path = option(MISSING, "folder to write")
        steps: int = option(50, "denoising steps per image", low=1, high=1000)

Values come from, each overriding the one before: defaults, ``--preset``, ``--config file.toml``, flags.
"""

import argparse
import difflib
import inspect
import json
import math
import os
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import dfkd
from dfkd.cli.values import check, convert, split_optional
from dfkd.errors import Stopped, UsageError
from dfkd.presets import PRESETS, Preset
from dfkd_engine.errors import EngineError

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field with what ``--help`` and the checks need; default ``MISSING`` makes it required.

    ``low`` and ``high`` are inclusive; ``unit`` is shown in the help (e.g. "images", "pixels").
    Fields are keyword-only, so a required one may stand after one with a default.
    """
    metadata = {"help": help, "choices": choices, "unit": unit, "low": low, "high": high}
    return field(default=default, kw_only=True, metadata=metadata)


def parse(cls: type[T], argv: Sequence[str], command: str, presets: Mapping[str, Preset]) -> T:
    """``argv`` (without the program name) as an instance of ``cls``.

    Raises UsageError for an unknown flag, key or preset (naming the nearest known ones), a value of the wrong type,
    out of range or not among the choices, and a required option that is absent; SystemExit(0) after ``--help``.
    """
    known = _options(cls)
    ours = {name: preset for name, preset in presets.items() if preset.overrides(command)}
    parser = _parser(cls, command, ours)
    given, unknown = parser.parse_known_args(list(argv))
    if unknown:
        guess = _nearest(unknown[0].split("=")[0], [*map(_flag, known), "--preset", "--config"])
        raise UsageError(f"unknown argument {unknown[0]}", guess, _more(command))
    flags: dict[str, Any] = vars(given)
    layers: list[tuple[str, Mapping[str, object]]] = []
    if "preset" in flags:
        name = flags.pop("preset")
        if name not in ours:
            raise UsageError(f"unknown preset {name!r} for {command}", _nearest(name, ours))
        layers.append((f"preset {name}: ", ours[name].overrides(command)))
    if "config" in flags:
        path = Path(flags.pop("config"))
        layers.append((f"{path}: ", _read_config(path)))
    layers.append(("--", {key.replace("_", "-"): value for key, value in flags.items()}))

    kinds = get_type_hints(cls)
    values: dict[str, Any] = {}
    for prefix, layer in layers:
        for key, raw in layer.items():
            name, source = key.replace("-", "_"), f"{prefix}{key}"
            if name not in known:
                raise UsageError(f"{prefix}unknown option {key!r}", _nearest(name, known), _more(command))
            values[name] = convert(raw, kinds[name], source)
            check(values[name], known[name], source)
    for name, spec in known.items():
        if spec.default is MISSING and name not in values:
            wanted = f"{command} needs it: {spec.metadata['help']}"
            raise UsageError(f"{_flag(name)} is missing", wanted, _more(command))
    try:
        return cls(**values)
    except ValueError as error:  # raised by __post_init__: options that do not fit together
        raise UsageError(str(error), todo=_more(command)) from None


def command(
    cls: type[T], run: Callable[[T], Mapping[str, Any] | None], name: str, argv: Sequence[str] | None = None
) -> int:
    """Parse, run, print the result as one JSON line (the last of stdout); returns the exit status.

    0 done; 2 UsageError or EngineError, printed as ``error: ...`` on stderr; 130 interrupted; 128 + n stopped by signal
    n with its state saved (143 for SIGTERM). A result of None, of a process that is not the first of its run, is not
    printed.
    """
    try:
        result = run(parse(cls, sys.argv[1:] if argv is None else argv, name, PRESETS))
    except (UsageError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    if result is not None:
        print(json.dumps(plain(result), allow_nan=False), flush=True)
    return 0


def save_settings(options: Any, folder: Path, command: str) -> Path:
    """Write ``folder/settings.json`` (every option's value and the versions behind them); returns its path.

    The text depends on the values alone, not on how they were given; written beside and renamed.
    """
    settings = {
        "command": command,
        "options": plain(asdict(options)),
        "versions": {"dfkd": dfkd.__version__, **{name: version(name) for name in ("diffusers", "torch")}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    beside = folder / f".settings.json.{os.getpid()}"
    beside.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    beside.replace(path)
    return path


def plain(value: Any) -> Any:
    """``value`` in JSON's types: paths as text, tuples as lists, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, todo=_more(self.prog))


def _parser(cls: type[Any], command: str, presets: Mapping[str, Preset]) -> argparse.ArgumentParser:
    listed = [f"  {name:<{max(map(len, presets))}}  {preset.description}" for name, preset in presets.items()]
    parser = _Parser(
        prog=command,
        description=inspect.cleandoc(cls.__doc__ or ""),
        epilog="\n".join(["presets:", *listed]) if listed else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {dfkd.__version__}")
    if listed:
        parser.add_argument("--preset", metavar="NAME", help="start from published settings, listed below")
    parser.add_argument("--config", metavar="FILE", help="TOML file of options (name = value); flags override it")
    kinds = get_type_hints(cls)
    for name, spec in _options(cls).items():
        kind, _ = split_optional(kinds[name])
        text = _help(spec).replace("%", "%%")
        if kind is bool:
            parser.add_argument(_flag(name), dest=name, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(_flag(name), dest=name, metavar=_METAVARS.get(kind, "NAME,..."), help=text)
    return parser


_METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


def _help(spec: "Field[Any]") -> str:
    """Help text, then what may be given: choices, range with unit, default."""
    choices, unit, low, high = (spec.metadata[key] for key in ("choices", "unit", "low", "high"))
    facts = ["one of " + ", ".join(map(str, choices))] if choices else []
    bounds = {(True, True): f"{low} to {high}", (True, False): f"at least {low}", (False, True): f"at most {high}"}
    facts += [" ".join(part for part in (bounds.get((low is not None, high is not None), ""), unit) if part)]
    facts += ["required" if spec.default is MISSING else f"default {_shown(spec.default)}"]
    return f"{spec.metadata['help']} ({'; '.join(fact for fact in facts if fact)})"


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    text = ",".join(default) if isinstance(default, tuple) else str(default)
    return text if text and default is not None else "none"


def _options(cls: type[Any]) -> "dict[str, Field[Any]]":
    return {spec.name: spec for spec in fields(cls)}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _more(command: str) -> str:
    return f"See {command} --help"


def _nearest(name: str, known: Iterable[str]) -> str:
    """The known names closest to ``name``, or all of them where none is close."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return "did you mean " + " or ".join(close) if close else "known are " + ", ".join(names)


def _read_config(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read --config {path}", error.strerror or str(error)) from None
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise UsageError(f"--config {path} is not TOML", str(error)) from None
