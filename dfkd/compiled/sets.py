"""Engine sets: which engines belong together, as build/engines.toml describes them."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dfkd.config import QUANTISING_BACKENDS, STORED_BACKENDS
from dfkd.cli.generate_options import GenerateOptions
from dfkd.cli.options import parse
from dfkd.compiled.requests import needed, takes
from dfkd.errors import UsageError
from dfkd.presets import PRESETS

_KEYS = ("backends", "networks", "targets", "generate")


@dataclass(frozen=True)
class EngineSet:
    """A run's options, the networks of it that are compiled, what compiles each, and for which GPU architectures where
    that is done ahead of time."""

    name: str
    options: GenerateOptions
    networks: tuple[str, ...]
    backends: tuple[str, ...]
    targets: tuple[str, ...] = ()


def read_set(file: Path, name: str, more: Sequence[str] = ()) -> EngineSet:
    """The set `name` of a file of the form of build/engines.toml; `more` are flags of dfkd-generate that override it.

    Raises UsageError: no such file or set, an unknown key, backend, network or option.
    """
    try:
        sets = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        todo = "run in a checkout of the project, or name a file with --sets; or give options of dfkd-generate after --"
        raise UsageError(f"cannot read {file}", error.strerror or str(error), todo) from None
    except ValueError as error:
        raise UsageError(f"{file} is not TOML", str(error)) from None
    if name not in sets:
        raise UsageError(f"{file} has no set {name!r}", f"it has {', '.join(sets)}", "choose one of them with --set")
    table: Mapping[str, Any] = sets[name]
    if unknown := sorted(table.keys() - set(_KEYS)):
        raise UsageError(f"{file}: [{name}] has an unknown key {unknown[0]!r}", f"known are {', '.join(_KEYS)}")
    words = [word for key, value in table.get("generate", {}).items() for word in ("--" + key, _text(value))]
    chosen = _set(name, [*words, *more], table.get("networks"), table.get("backends"))
    return replace(chosen, targets=tuple(table.get("targets", ())))


def set_of(more: Sequence[str]) -> EngineSet:
    """The set that a run of dfkd-generate with these flags uses. Raises UsageError."""
    return _set("", more, None, None)


def narrowed(chosen: EngineSet, networks: Sequence[str], backend: str, targets: Sequence[str] = ()) -> EngineSet:
    """With some of its networks (() for all), one backend ("" for its own) and other targets (() for its own).

    Raises UsageError.
    """
    if unknown := [name for name in networks if name not in chosen.networks]:
        raise UsageError(f"--only names {unknown[0]!r}", f"this set has {', '.join(chosen.networks)}")
    narrow = replace(
        chosen,
        networks=tuple(networks) or chosen.networks,
        backends=(backend,) if backend else chosen.backends,
        targets=tuple(targets) or chosen.targets,
    )
    for network in narrow.networks:
        if not any(takes(narrow.options, network, backend) for backend in narrow.backends):
            what = f"{', '.join(narrow.backends)} takes no {narrow.options.quantise} {network}"
            able = [name for name in STORED_BACKENDS if takes(narrow.options, network, name)]
            todo = f"use --backend {able[0]}, or leave it out with --only"
            raise UsageError(what, f"8-bit networks are engines of {', '.join(able)}", todo)
    return narrow


def _set(name: str, words: Sequence[str], networks: Sequence[str] | None, backends: Sequence[str] | None) -> EngineSet:
    options = parse(GenerateOptions, ["--out", ".", *words], "dfkd-generate", PRESETS)
    used = needed(options)
    if not used:
        why = "it differentiates through UNet and decoder, and an engine has no backward pass"
        raise UsageError("--gradient unet uses no engines", why, "use --gradient latent")
    able = STORED_BACKENDS if options.quantise == "none" else [b for b in STORED_BACKENDS if b in QUANTISING_BACKENDS]
    chosen = tuple(backends or (able[0],))
    for what, known, kind in ((chosen, STORED_BACKENDS, "backend"), (tuple(networks or used), used, "network")):
        if unknown := [word for word in what if word not in known]:
            raise UsageError(f"the set {name} names the {kind} {unknown[0]!r}", f"known are {', '.join(known)}")
    return EngineSet(name, options, tuple(networks or used), chosen)


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
