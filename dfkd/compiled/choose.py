"""Which engine computes which function of a run, and why.

`auto` takes the quickest engine that the store holds for exactly this function, and eager where none was measured
quicker by a clear margin; a named backend must have them all. An engine that was built for other rows will do where the
run's calls fit it. Nothing is built here. A function in 8 bits is an engine or the run is refused, under `auto` too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from dfkd.compiled.engines import backend_of, changes, engine_spec, reasons, takes
from dfkd.compiled.functions import Function
from dfkd.config import BACKENDS, QUANTISING_BACKENDS, ComputeConfig
from dfkd.errors import UsageError
from dfkd_engine.compiled import Engine, load
from dfkd_engine.devices import architecture
from dfkd_engine.spec import EngineSpec, differences
from dfkd_engine.store import EngineStore, Manifest

EAGER = "eager"
MARGIN = 0.95  # an engine's time over eager's below which it is taken: closer than that is noise

Found = dict[str, Manifest]  # by backend, as --backend names it


@dataclass(frozen=True)
class Choice:
    """What computes one function: the engine `key` of the store, or eager where that is None. why: for people."""

    network: str
    backend: str
    key: str | None
    why: str


def choose(
    functions: Sequence[Function],
    compute: ComputeConfig,
    store: EngineStore,
    before: Mapping[str, str] | None = None,
    build_command: str = "dfkd-engines build",
) -> tuple[Choice, ...]:
    """A choice for every function.

    before: function's name -> key, as a folder that is continued was begun; what it lacks was eager. The folder goes on
        with these, since engines differ in the last bits.

    Raises UsageError: a named backend lacks an engine (with the command that builds it) or cannot be used, or what the
    folder was begun with is not there or not what is asked for. EngineError: its manifest is damaged.
    """
    asked = compute.backend
    if not functions and asked not in ("auto", EAGER):
        why = "nothing in this run can be an engine, which has no backward pass: --gradient unet differentiates all"
        raise UsageError(f"--backend {asked} cannot be used", why, "use --gradient latent, or --backend eager")
    if not functions:
        return ()
    if asked == EAGER and before is None:
        return tuple(Choice(function.name, EAGER, None, "--backend eager") for function in functions)
    device = architecture(functions[0].device)
    if asked not in ("auto", EAGER) and (reason := backend_of(asked).unusable(device, functions[0].dtype)) is not None:
        raise UsageError(f"--backend {asked} cannot be used", reason, "choose another --backend")
    if before is not None:
        return tuple(_again(f, before, asked, device, store, build_command) for f in functions)
    found = {function.name: found for function, found in _engines(functions, asked, device, store)}
    if lacking := [f for f in functions if not found[f.name] and (asked != "auto" or f.quantise != "none")]:
        named = asked if asked != "auto" else QUANTISING_BACKENDS[0]
        why = "; ".join(reasons(store.explain(engine_spec(lacking[0], named, device))))
        what = f"{'' if asked == 'auto' else asked + ' '}engine in {store.root} for {', '.join(map(str, lacking))}"
        raise UsageError(f"there is no {what}", f"{lacking[0].name}: {why}", f"build it: {build_command}")
    return tuple(_choice(function, found[function.name], asked, build_command) for function in functions)


def describe(choices: Iterable[Choice]) -> list[str]:
    """A line for each backend and reason, for people."""
    lines: dict[str, list[str]] = {}
    for choice in choices:
        lines.setdefault(f"{choice.backend} ({choice.why})", []).append(choice.network)
    return [f"{', '.join(networks)}: {how}" for how, networks in lines.items()]


def load_engines(choices: Iterable[Choice], store: EngineStore, device: torch.device | str) -> dict[str, Engine]:
    """Function's name -> engine on `device`, for the choices that are engines; every file is verified first.

    Raises EngineError: an engine is missing, damaged, or cannot run here.
    """
    return {
        choice.network: load(store, choice.key, device, backend_of(choice.backend))
        for choice in choices
        if choice.key is not None
    }


def _engines(
    functions: Sequence[Function], asked: str, device: str, store: EngineStore
) -> Iterator[tuple[Function, Found]]:
    """Each function with its engines in the store, of the backend that is asked for or of all."""
    there = {(manifest.spec.network, manifest.spec.backend) for manifest in store.list()}
    for function in functions:
        names = [asked] if asked != "auto" else [name for name in BACKENDS if (function.name, name) in there]
        specs = {name: engine_spec(function, name, device) for name in names if takes(name, function)}
        found = {name: _find(function, spec, store) for name, spec in specs.items()}
        yield function, {name: manifest for name, manifest in found.items() if manifest is not None}


def _find(function: Function, spec: EngineSpec, store: EngineStore) -> Manifest | None:
    """The engine of this spec, else of those that differ in their rows alone the smallest that the run's calls fit."""
    if (exact := store.find(spec)) is not None:
        return exact
    others = [manifest for manifest in store.differing_only(spec, "rows") if _fits(function, manifest.spec)]
    return min(others, key=lambda manifest: manifest.spec.rows[2], default=None)


def _fits(function: Function, spec: EngineSpec) -> bool:
    """Whether an engine of this spec takes the calls of the function, whatever their rows were when it was built."""
    smallest, planned, largest = spec.rows
    return function.rows == planned if function.one_shape else smallest <= function.rows <= largest


def _choice(function: Function, engines: Found, asked: str, build_command: str) -> Choice:
    name = function.name
    if asked != "auto":
        return Choice(name, asked, engines[asked].key, f"--backend {asked}")
    if not engines:
        return Choice(name, EAGER, None, f"no engine is built: {build_command}")
    quickest = min(engines, key=lambda backend: float(engines[backend].facts["milliseconds"]["engine"]))
    key, times = engines[quickest].key, engines[quickest].facts["milliseconds"]
    if function.quantise != "none":
        return Choice(name, quickest, key, f"--quantise {function.quantise}")
    measured = f"{times['rows']} rows, {times['threads']} threads, when it was built"
    if times["engine"] < MARGIN * times["eager"]:
        return Choice(name, quickest, key, f"{times['engine']} ms a call, eager {times['eager']}: {measured}")
    return Choice(name, EAGER, None, f"{times['eager']} ms a call, {quickest} {times['engine']}: {measured}")


def _again(
    function: Function, before: Mapping[str, str], asked: str, device: str, store: EngineStore, build_command: str
) -> Choice:
    """What a folder was begun with; a named backend has eager functions beside its engines once calls were halved.

    Raises UsageError where these options contradict it.
    """
    name, begun, why = function.name, before.get(function.name, EAGER), "the folder was begun with it"
    todo = "repeat the options that it was begun with, or choose another --out"
    if begun == EAGER:
        if (before or asked in ("auto", EAGER)) and function.quantise == "none":
            return Choice(name, EAGER, None, why)
        reason = f"--backend {asked}" if function.quantise == "none" else f"--quantise {function.quantise}"
    elif asked == EAGER:
        reason = "--backend eager"
    elif (manifest := store.get(begun)) is None:
        reason, todo = f"{store.root} does not hold it", f"build it again ({build_command}), or choose another --out"
    else:
        backend = manifest.spec.backend if asked == "auto" else asked
        if backend not in BACKENDS and ".py:" not in backend:
            reason = f"--backend auto does not know its backend {backend}"
        else:
            fields = differences(manifest.spec, engine_spec(function, backend, device))
            against = changes([field for field in fields if not field[0].startswith("rows.")])
            if not _fits(function, manifest.spec):
                against.append(f"it takes up to {manifest.spec.rows[2]} rows and a call has {function.rows}")
            if not against:
                return Choice(name, backend, begun, why)
            reason = "; ".join(against)
    what = "without engines" if begun == EAGER else f"with the engine {begun}"
    lost = f"its {name} was begun {what}, and now {reason}; others differ in the last bits"
    raise UsageError("this folder cannot be continued", lost, todo)
