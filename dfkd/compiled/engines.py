"""From a function to an engine in the store: its key, and where no engine has it, trace, compile, judge and time one.

The key is known before anything is traced. It holds the function's settings, components and shapes, the backend with
its versions and options, the device, and the digest of the Python behind all of these; what changes one of them gives
another key, and the engine is built anew.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

import dfkd_kernels
from dfkd.compiled import calibration
from dfkd.compiled.functions import Call, Function
from dfkd.config import BACKENDS, QUANTISING_BACKENDS
from dfkd.extension import described, resolve, source_digest
from dfkd_engine import sources_digest
from dfkd_engine.attention import set_attention
from dfkd_engine.backends import Backend, Tunable, compile_graph, get
from dfkd_engine.backends.packages import versions
from dfkd_engine.compiled import Engine
from dfkd_engine.devices import architecture, covers, family, kind_of, targets_of
from dfkd_engine.errors import EngineError
from dfkd_engine.graph import Graph, trace
from dfkd_engine.group_norms import KERNELS, group_norms, running
from dfkd_engine.parity import TOLERANCE, measure
from dfkd_engine.quantise import quantised
from dfkd_engine.spec import Difference, EngineSpec
from dfkd_engine.store import EngineStore, Manifest
from dfkd_engine.tracing.module_paths import networks_of

JUDGED_ROWS = (4, 3)  # batches of samples that parity is measured on
TIMED_TURNS = 3  # engine and eager in turns, after one warm-up each
SEED = 0

# Tracing takes longer than compiling for some backends; a graph lives as long as its function.
_graphs: WeakKeyDictionary[Function, dict[str, Graph]] = WeakKeyDictionary()


def backend_of(name: str) -> Backend:
    """The backend of this name; `FILE.py:NAME` is an object, or a class of no arguments, in a file of the user's own.

    Raises EngineError or UsageError where there is none.
    """
    if ".py:" not in name:
        return get(name)
    found, settings = resolve(name, {}, "backend")
    backend: Backend = found(**settings) if callable(found) else found
    return backend


def takes(backend: str, function: Function) -> bool:
    """Whether the backend can have an engine of the function: not every one has 8 bits."""
    return function.quantise == "none" or backend in QUANTISING_BACKENDS or backend not in BACKENDS


def engine_spec(function: Function, backend: str, device: str) -> EngineSpec:
    """All that an engine of the function follows from; its `key()` is the engine's name in a store.

    backend: a name, or FILE.py:NAME. device: as `dfkd_engine.devices.architecture` or `family` writes it.
    """
    own = backend_of(backend)
    packages, flags = versions("torch", "diffusers") | own.versions(), dict(own.flags(device))
    sources = [function.sources, sources_digest()]
    if backend not in BACKENDS:
        sources.append(described(own)["source"])
    if _has_two_group_norms(function, own, device):
        flags["group_norm"] = "quicker"
        sources.append(source_digest(*sorted(Path(*dfkd_kernels.__path__).glob("group_norm*.py"))))
    if function.quantise != "none":
        flags["quantise"] = function.quantise
        packages |= versions("nvidia-modelopt")
        sources.append(source_digest(Path(calibration.__file__)))
    fixed = own.fixed_rows or function.one_shape
    rows = function.rows if fixed else function.largest
    return EngineSpec(
        network=function.name,
        config=function.config,
        components=function.components,
        inputs=function.inputs,
        outputs=function.outputs,
        rows=(1, rows, rows),
        dtype=function.dtype,
        backend=own.name,
        versions=packages,
        device=device,
        flags=flags,
        sources=hashlib.sha256(" ".join(sources).encode()).hexdigest(),
    )


def build(
    function: Function,
    backend: str,
    store: EngineStore,
    *,
    targets: Sequence[str] = (),
    kernels: str = "torch",
    say: Callable[[str], object] = lambda line: None,
) -> tuple[str, Manifest]:
    """("current" or "built", the engine of a function), made where it is missing or damaged.

    targets: GPU architectures such as "sm_89" that it is compiled for without having one; a machine with such a GPU and
        the same store takes it over in its own build, judges and times it.
    kernels: group norms of the eager run that it is timed beside, "torch" or "triton".
    say: gets a line before the work begins.

    Raises EngineError: the backend cannot be used here, the function cannot be traced, the engine misses its tolerance
    (it is not saved then), or the disk refuses.
    """
    own, device = backend_of(backend), family(targets) if targets else architecture(function.device)
    spec = engine_spec(function, backend, device)
    if store.problem(spec.key()) is None and (found := store.get(spec.key())) is not None:
        return "current", found
    what = f"{function} in {own.name}, up to {spec.rows[2]} rows"
    why = own.unusable(device, spec.dtype)
    if targets and not own.targets:
        why = f"{own.name} compiles for the machine that it is on, not for {', '.join(targets)}"
    if not takes(backend, function):
        why = f"engines in 8 bits are those of {', '.join(QUANTISING_BACKENDS)}"
    if why is not None:
        raise EngineError(f"{what} cannot be built", why, "choose another backend with --backend")
    say(f"{what}: {'; '.join(reasons(store.explain(spec)))}")
    made = []

    def make(folder: Path) -> dict[str, Any]:
        made.append(folder)
        started = time.perf_counter()
        facts = _compile(function, own, spec, store, folder)
        facts["compile_seconds"] = round(time.perf_counter() - started, 2)
        if targets_of(device):  # nothing here runs it
            return facts
        if isinstance(own, Tunable):
            facts["ways"] = own.tune(folder, spec, function.device, function.samples(function.rows, SEED))
        engine = Engine(spec, own.load(folder, spec, function.device), function.device)
        return {**facts, "parity": _judge(what, function, engine), "milliseconds": _time(function, engine, kernels)}

    manifest = store.build(spec, make)
    return "built" if made else "current", manifest


def reasons(differences: Sequence[Difference]) -> list[str]:
    """Why an engine is not current, of `EngineStore.explain`: a phrase a field; digests are cut short."""
    fields = {field: (there, here) for field, there, here in differences}
    for field, phrase in (
        ("network", "it was not built yet"),
        ("flags.quantise", "it was not built with this --quantise yet"),
        ("backend", "it was not built with this backend yet"),
    ):
        if field in fields:
            return [phrase]
    if "engine" in fields:
        return [f"it is damaged: {fields['engine'][0]}"]
    return changes(differences)


def changes(differences: Sequence[Difference]) -> list[str]:
    """Each field with what it was and what it is; digests are cut short."""
    return [f"{field} was {_short(there)} and is {_short(here)}" for field, there, here in differences]


def _short(value: str) -> str:
    return value[:12] if len(value) >= 16 and all(c in "0123456789abcdef" for c in value) else value


def _has_two_group_norms(function: Function, backend: Backend, device: str) -> bool:
    """Whether the function is compiled with torch's group norms and with the kernel's, and the quicker is kept.

    Only inductor's engines call back into this process, where the kernel is.
    """
    if backend.name != "inductor" or kind_of(device) != "cuda":
        return False
    return any(group_norms(network).layers for network in function.networks)


def _compile(
    function: Function, backend: Backend, spec: EngineSpec, store: EngineStore, folder: Path
) -> dict[str, Any]:
    """Write the payload, taken over from one that was compiled ahead of time where there is one; facts about it."""
    for ahead in store.differing_only(spec, "device"):
        if covers(ahead.spec.device, spec.device):
            shutil.copytree(store.payload(ahead), folder, dirs_exist_ok=True)
            return {"compiled_ahead": ahead.key}
    if "group_norm" in spec.flags:
        return {"group_norm": _quicker(function, backend, spec, folder)}
    graph = _traced(function, "torch")
    if function.quantise != "none":
        graph = _in_eight_bits(function, graph)
    compile_graph(backend, graph, spec, folder)
    return {}


def _traced(function: Function, group_norm: str) -> Graph:
    graphs = _graphs.setdefault(function, {})
    if group_norm not in graphs:
        with _traceable(function.networks, group_norm):
            graphs[group_norm] = trace(
                function.call,
                function.inputs,
                output_names=[output.name for output in function.outputs],
                device=function.device,
                also=KERNELS if group_norm == "triton" else (),
            )
    graph = graphs[group_norm]
    if graph.outputs != function.outputs:
        got, wanted = ("; ".join(map(str, outputs)) for outputs in (graph.outputs, function.outputs))
        raise EngineError(f"{function} gives {got}", f"it is declared to give {wanted}", "correct its outputs")
    return graph


@contextmanager
def _traceable(networks: Sequence[nn.Module], group_norm: str) -> Iterator[None]:
    """The networks with torch's own attention, which tracing takes apart, and group norms of this name."""
    attention = [(network, dict(own)) for network in networks if (own := getattr(network, "attn_processors", None))]
    try:
        for network, _ in attention:
            set_attention(network, "sdpa")
        with running(tuple(networks), group_norm):
            yield
    finally:
        for network, own in attention:
            network.set_attn_processor(own)  # type: ignore[operator]


def _in_eight_bits(function: Function, graph: Graph) -> Graph:
    assert function.calibrate is not None, "a quantised function says what it is calibrated on"
    network = function.networks[0]
    root = next(path for path, reached in networks_of(function.call).items() if reached is network)
    found = calibration.magnitudes(network, function.calibrate, function.quantise)
    return quantised(graph, {f"{root}.{name}": amax for name, amax in found.items()}, function.quantise)


def _quicker(function: Function, backend: Backend, spec: EngineSpec, folder: Path) -> dict[str, Any]:
    """Compile with torch's group norms and with the kernel's and keep the quicker engine in `folder`.

    Returns which it is, and milliseconds a call of each.
    """
    engines = {}
    for name in ("torch", "triton"):
        (folder / name).mkdir()
        compile_graph(backend, _traced(function, name), spec, folder / name)
        engines[name] = Engine(spec, backend.load(folder / name, spec, function.device), function.device)
    milliseconds = _in_turns(engines, function)
    kept = min(milliseconds, key=lambda name: milliseconds[name])
    engines.clear()  # before their files go
    for file in (folder / kept).iterdir():
        file.rename(folder / file.name)
    for name in milliseconds:
        shutil.rmtree(folder / name)
    return {"kept": kept, "milliseconds": milliseconds}


def _judge(what: str, function: Function, engine: Engine) -> dict[str, float]:
    """Errors against the call in float64. Raises EngineError where they miss the tolerance."""
    precision = function.dtype if function.quantise == "none" else function.quantise
    batches = [function.samples(min(rows, engine.spec.rows[2]), SEED + i) for i, rows in enumerate(JUDGED_ROWS)]
    with torch.no_grad(), running(function.networks, "torch"):
        parity = measure(engine, function.exact(), function.call, batches, function.kind, precision)
    if (problem := parity.problem(TOLERANCE[function.kind, precision])) is not None:
        todo = "report it, and use another backend for this function"
        raise EngineError(f"{what} is not saved", f"against float64 {problem}", todo)
    return parity.to_json()


def _time(function: Function, engine: Engine, kernels: str) -> dict[str, Any]:
    """Milliseconds of a call of the planned rows, engine and eager in turns on the same tensors."""
    with running(function.networks, kernels):
        found = _in_turns({"engine": engine, "eager": function.eager or function.call}, function)
    return {**found, "rows": function.rows, "threads": torch.get_num_threads(), "kernels": kernels}


@torch.no_grad()
def _in_turns(calls: Mapping[str, Call], function: Function) -> dict[str, float]:
    """Milliseconds of each call, the median of TIMED_TURNS after one to warm up."""
    arguments = function.samples(function.rows, SEED)
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(TIMED_TURNS + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call(*arguments)
            if function.device.type == "cuda":
                torch.cuda.synchronize(function.device)
            if turn:
                spent[name].append(1000 * (time.perf_counter() - started))
    return {name: round(median(values), 2) for name, values in spent.items()}
