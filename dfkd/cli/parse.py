"""A command from its settings class: flags, presets, files, `--help`, and what is printed at the end.

    sys.exit(command(GenerateCommand, run, "dfkd-generate", argv))

Values come from, each overriding the one before: defaults, `--preset`, `--config` (TOML, or the settings.json of a
run), flags. A file may hold the options themselves, or the command's section of a run file.
"""

import argparse
import inspect
import json
import os
import sys
import tomllib
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_origin

import dfkd
from dfkd.allocator import keep_freed_memory
from dfkd.cli.closing import closing
from dfkd.config.fields import Config, Leaf, leaves, merged, plain, presets, section, split_optional
from dfkd.config.words import dashed, nearest
from dfkd.errors import SettingError, Stopped, UsageError
from dfkd.files import save_settings, system_fault
from dfkd_engine.errors import EngineError, first_line

__all__ = ["command", "parse", "save_settings"]

C = TypeVar("C", bound=Config)


def command(
    cls: type[C], run: Callable[[C], Mapping[str, Any] | None], name: str, argv: Sequence[str] | None = None
) -> int:
    """Parse, run, print the result as one line of JSON, the last of stdout; returns the exit status.

    On stderr the last lines say what was made and how to go on (dfkd.cli.closing).

    0: done. 2: UsageError, EngineError or SettingError, or what the system refused (a full disk), printed as
    `error: ...` on stderr. 1: any other exception, in one line too, with its traceback before it where DFKD_DEBUG=1 is
    set. 130: interrupted. 128 + n: stopped by signal n with its state saved. A result of None (of a process that is not
    the first of its run) is not printed.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            asked = parse(cls, sys.argv[1:] if argv is None else argv, name)
            keep_freed_memory()
            result = run(asked)
    except (UsageError, EngineError, SettingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except Exception as error:
        if os.environ.get("DFKD_DEBUG") == "1":
            traceback.print_exc()
        if isinstance(error, OSError) and error.strerror:  # the system's own words: a full disk, a file that is gone
            print(f"error: {system_fault(error)}", file=sys.stderr)
            return 2
        fault = "This is a fault of the program or of an extension: set DFKD_DEBUG=1 for the traceback."
        print(f"error: {type(error).__name__}: {first_line(error)}. {fault}", file=sys.stderr)
        return 1
    if result is not None:
        for line in closing(asked, result):
            print(line, file=sys.stderr)
        print(json.dumps(plain(result), allow_nan=False), flush=True)
    return 0


def parse(cls: type[C], argv: Sequence[str], name: str) -> C:
    """`argv` (without the program's name) as settings.

    Raises UsageError: an unknown flag, key or preset, with the nearest known ones; a value of the wrong type, out of
    range or not among the choices; a required option that is absent. Raises SystemExit(0) after --help.
    """
    known = leaves(cls)
    parser = _parser(cls, name)
    given, unknown = parser.parse_known_args([dashed(word) for word in argv])
    if unknown:
        if cls.POSITIONAL and unknown[0].partition("=")[0] == _flag(cls.POSITIONAL):
            why = f"the {cls.POSITIONAL} is given without a flag"
        else:
            why = nearest(unknown[0], known, "--")
        raise UsageError(f"unknown argument {unknown[0]}", why, f"See {name} --help")
    flags = vars(given)
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if "preset" in flags and "preset" not in known:
        layers.append((f"preset {flags['preset']}: ", _read_preset(cls, flags.pop("preset"), name)))
    if "config" in flags:
        layers.append((f"{flags['config']}: ", _read_config(cls, Path(flags.pop("config")), name)))
    layers.append(("--", flags))
    values = merged(cls, *(_checked(layer, known, prefix, name) for prefix, layer in layers))
    for key, leaf in known.items():
        if values.get(key, leaf.default) is MISSING:
            raise UsageError(f"{_flag(key)} is missing", f"{name} needs it: {leaf.facts['help']}", f"See {name} --help")
    try:
        return cls.of(**values)
    except ValueError as error:  # of settings that do not fit together
        raise UsageError(str(error), todo=f"See {name} --help") from None


def _checked(layer: Mapping[str, Any], known: Mapping[str, Leaf], prefix: str, name: str) -> dict[str, Any]:
    """One layer's values as the options' types; `prefix` says in an error where they come from."""
    values = {}
    for key, raw in layer.items():
        shown = key.replace("_", "-")
        if key not in known:
            raise UsageError(f"{prefix}unknown option '{shown}'", nearest(key, known), f"See {name} --help")
        words = prefix == "--" and isinstance(raw, list)  # several words, each with commas of its own
        try:
            found = [known[key].convert(word) for word in (raw if words else [raw])]
        except ValueError as error:
            raise UsageError(f"{prefix}{shown} is {' '.join(raw) if words else raw!r}", str(error)) from None
        values[key] = tuple(item for part in found for item in part) if words else found[0]
    return values


def _presets(cls: type[Config]) -> dict[str, Mapping[str, Any]]:
    """The presets that set something of this command; of a whole job, those that name a teacher's data too."""
    whole = "preset" in leaves(cls)
    return {
        name: file
        for name, file in presets().items()
        if ("data" in file.get("teacher", {}) if whole else cls.SECTION in file)
    }


def _read_preset(cls: type[Config], preset: str, name: str) -> dict[str, Any]:
    if preset not in (known := _presets(cls)):
        raise UsageError(f"unknown preset '{preset}' for {name}", nearest(preset, known))
    return section(known[preset], cls.SECTION)


def _read_config(cls: type[Config], path: Path, name: str) -> dict[str, Any]:
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if kind == "JSON" else tomllib.loads(text)
        if kind == "JSON":
            found, whose = dict(found["options"]), found["command"]
    except OSError as error:
        raise UsageError(f"cannot read --config {path}", error.strerror or str(error)) from None
    except (ValueError, KeyError, TypeError) as error:  # also TOMLDecodeError, JSONDecodeError, UnicodeDecodeError
        wanted = "give name = value lines in TOML, or the settings.json of a run"
        raise UsageError(f"--config {path} cannot be read as {kind}", str(error), wanted) from None
    if kind == "JSON" and whose != name:
        raise UsageError(f"--config {path} is of {whose}", f"this is {name}", "give that of one of its own runs")
    return section(found if isinstance(found.get(cls.SECTION), dict) else {cls.SECTION: found}, cls.SECTION)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, todo=f"See {self.prog} --help")


def _parser(cls: type[Config], name: str) -> argparse.ArgumentParser:
    known, ours = leaves(cls), _presets(cls)
    wanted = "".join(f" {_flag(key)} {_metavar(leaf)}" for key, leaf in known.items() if leaf.default is MISSING)
    listed = [f"  {key:<{max(map(len, ours))}}  {file['description']}" for key, file in ours.items()]
    parser = _Parser(
        prog=name,
        usage=name + (f" [{cls.POSITIONAL.upper()}]" if cls.POSITIONAL else "") + wanted + " [options]",
        description=inspect.cleandoc(cls.__doc__ or ""),
        epilog="\n".join(["presets:", *listed]) if listed else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {dfkd.__version__}")
    if listed and "preset" not in known:
        parser.add_argument("--preset", metavar="NAME", help="start from published settings, listed below")
    if cls.POSITIONAL:  # --config is another word for it
        parser.add_argument("--config", dest=cls.POSITIONAL, help=argparse.SUPPRESS)
    else:
        parser.add_argument("--config", metavar="FILE", help="TOML file of options, or the settings.json of a run")
    groups: dict[str, Any] = {"": parser}
    for key, leaf in known.items():
        title = "" if leaf.owner is cls or leaf.owner.SECTION else (leaf.owner.__doc__ or "").splitlines()[0]
        if title not in groups:
            groups[title] = parser.add_argument_group(title, f"example: {leaf.owner.EXAMPLE}")
        kind, _ = split_optional(leaf.kind)
        facts: dict[str, Any] = {"help": _help(leaf).replace("%", "%%")}
        if kind is bool:
            facts["action"] = argparse.BooleanOptionalAction
        else:
            facts["metavar"] = _metavar(leaf)
        if get_origin(kind) is tuple:
            facts |= {"nargs": "+", "action": "extend"}
        if key == cls.POSITIONAL:
            groups[title].add_argument(key, nargs="?", **facts | {"metavar": key.upper()})
        else:
            groups[title].add_argument(_flag(key), dest=key, **facts)
    return parser


def _metavar(leaf: Leaf) -> str:
    kind, _ = split_optional(leaf.kind)
    names = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", tuple[int, ...]: "INT", tuple[float, ...]: "FLOAT"}
    return names.get(kind, "NAME")


def _help(leaf: Leaf) -> str:
    """Help text, then what may be given: choices, range with unit, default."""
    choices, unit, low, high = (leaf.facts[key] for key in ("choices", "unit", "low", "high"))
    own = " or FILE.py:NAME" if leaf.facts["extensible"] else ""
    facts = ["one of " + ", ".join(map(str, choices)) + own] if choices else []
    bounds = {(True, True): f"{low} to {high}", (True, False): f"at least {low}", (False, True): f"at most {high}"}
    facts += [" ".join(part for part in (bounds.get((low is not None, high is not None), ""), unit) if part)]
    default = ",".join(map(str, leaf.default)) if isinstance(leaf.default, tuple) else leaf.default
    shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else default
    absent = "none" if leaf.facts["none"] is None else "not given"  # where the word `none` says something else
    facts += ["required" if default is MISSING else f"default {absent if shown in (None, '') else shown}"]
    return f"{leaf.facts['help']} ({'; '.join(fact for fact in facts if fact)})"


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")
