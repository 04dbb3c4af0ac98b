"""From a request to an engine in the store: trace, compile, judge, time, save. What is current is left alone."""

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfkd.compiled.functions import OF_DECODER, OF_TEACHER, Function, Sources, function, samples
from dfkd.compiled.requests import Request
from dfkd_engine.backends import Backend, Tunable, get
from dfkd_engine.compiled import Engine
from dfkd_engine.errors import EngineError
from dfkd_engine.graph import Graph, trace
from dfkd_engine.group_norms import KERNELS, running
from dfkd_engine.networks import Prior
from dfkd_engine.parity import TOLERANCE, measure
from dfkd_engine.quantise import Amax, quantised
from dfkd_engine.spec import EngineSpec, pairs
from dfkd_engine.storage.manifest import Manifest
from dfkd_engine.store import EngineStore
from dfkd_engine.targets import covers, targets_of
from dfkd_engine.tracing.module_paths import networks_of

Calibrate = Callable[[Prior, str], Mapping[str, Amax]]
JUDGED_ROWS = (4, 3)  # batches of samples that parity is measured on
CUT_ROWS = (16, 32, 64)  # rows of calls, to see whether they keep the bits of a larger one
TIMED_TURNS = 3  # engine and eager in turns, after one warm-up each
SEED = 0
# The graphs that an engine is compiled from, by what a request says of its group norms.
GROUP_NORMS = {"torch": ("torch",), "triton": ("triton",), "quicker": ("torch", "triton")}


class Built(NamedTuple):
    """state: "current" (the recipe was known), "adopted" (the graph was, or another process built it), or "built"."""

    state: str
    manifest: Manifest


class Workshop:
    """Builds engines of one set of networks; a graph is traced once however many backends take it.

    sources: loads the networks; it is called once, and not at all where every recipe is known.
    calibrate: magnitudes in the prior's UNet, for "int8" or "fp8"; called where a request is for such an engine.
    kernels: of an eager run, "torch" or "triton": engines are timed beside it. The networks come with torch's group
        norms, and graphs are traced with those unless a request says otherwise; no graph holds other kernels.
    """

    def __init__(
        self,
        store: EngineStore,
        sources: Callable[[], Sources],
        calibrate: Calibrate | None = None,
        kernels: str = "torch",
    ) -> None:
        self.store = store
        self._load, self._calibrate, self._kernels = sources, calibrate, kernels
        self._loaded: Sources | None = None
        self._graphs: dict[tuple[str, str], tuple[Function, Graph]] = {}
        self._quantised: dict[str, Graph] = {}

    def build(self, request: Request) -> Built:
        """The engine of a request, built where it is missing or damaged.

        Raises EngineError: the backend cannot be used here, the function cannot be traced, the engine misses its
        tolerance (it is not saved then), or the disk refuses.
        """
        found = self.store.find(request.recipe)
        if found is not None and self.store.problem(found.key) is None:
            return Built("current", found)
        backend, device = get(request.backend), request.recipe["device"]
        why = backend.unusable(device, request.recipe["dtype"])
        if targets_of(device) and not backend.targets:
            why = f"{backend.name} compiles for the machine that it is on, not for {', '.join(targets_of(device))}"
        if why is not None:
            raise EngineError(f"{request} cannot be built", why, "or choose another backend with --backend")
        sources = self.sources()
        graphs = {}
        for norm in GROUP_NORMS[request.group_norm]:
            traced, graphs[norm] = self._traced(request.network, norm)
        if request.quantised != "none":
            graphs = {"torch": self._in_eight_bits(traced, graphs["torch"], request.quantised)}
        graph = next(iter(graphs.values()))
        spec = EngineSpec(
            network=request.network,
            graph=_together([each.structure() for each in graphs.values()]),
            weights=_together([each.weights() for each in graphs.values()]),
            inputs=graph.inputs,
            outputs=graph.outputs,
            batch=request.batch,
            dtype=request.recipe["dtype"],
            backend=request.backend,
            versions=_part(request, "versions."),
            device=device,
            flags=_part(request, "flags."),
        )
        if self.store.problem(spec.key()) is None:
            return Built("adopted", self.store.adopt(request.recipe, spec.key()))

        made: list[Path] = []

        def make(folder: Path) -> dict[str, Any]:
            made.append(folder)
            started = time.perf_counter()
            facts: dict[str, Any] = {"nodes": len(graph.module.graph.nodes), **identity(request.network, sources)}
            if (ahead := self._compiled_ahead(request, facts)) is not None:
                shutil.copytree(self.store.payload(ahead), folder, dirs_exist_ok=True)
                facts["compiled_ahead"] = ahead.key
            elif request.group_norm == "quicker":
                rows = samples(request.network, sources, request.timed, SEED)
                facts["group_norm"] = _quicker(backend, graphs, spec, folder, sources.prior.device, rows)
            else:
                backend.compile(graph, spec, folder)
            facts["compile_seconds"] = round(time.perf_counter() - started, 2)
            if targets_of(device):  # nothing here runs it: it is judged on the GPU that takes it over
                return facts
            place = sources.prior.device
            if isinstance(backend, Tunable):
                rows = samples(request.network, sources, spec.batch[1], SEED)
                facts["ways"] = backend.tune(folder, spec, place, rows)
            engine = Engine(spec, backend.load(folder, spec, place), place)
            return {
                **facts,
                **_judged(request, traced, graph, engine, sources),
                "rows_exact": _rows_exact(request, engine, sources),
                "milliseconds": _timed(request, engine, sources, self._kernels),
            }

        manifest = self.store.build(spec, request.recipe, make)
        return Built("built" if made else "adopted", manifest)

    def _compiled_ahead(self, request: Request, facts: Mapping[str, Any]) -> Manifest | None:
        """An engine of the same recipe for a family that this device belongs to, and of the networks in memory."""
        for manifest in self.store.alike(request.recipe, "device"):
            same = all(manifest.facts.get(name) == digest for name, digest in facts.items())
            if same and covers(manifest.spec.device, request.recipe["device"]):
                return manifest
        return None

    def sources(self) -> Sources:
        """The networks, loaded at the first call."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _traced(self, network: str, group_norm: str) -> tuple[Function, Graph]:
        if (network, group_norm) not in self._graphs:
            sources, also = self.sources(), KERNELS if group_norm == "triton" else ()
            made = function(network, sources)
            device = sources.prior.device
            with running((sources.prior.unet, sources.prior.vae), group_norm):
                graph = trace(made.call, made.inputs, output_names=made.outputs, device=device, also=also)
            self._graphs[network, group_norm] = made, graph
        return self._graphs[network, group_norm]

    def _in_eight_bits(self, unet: Function, graph: Graph, narrow: str) -> Graph:
        if narrow not in self._quantised:
            assert self._calibrate is not None
            prior = self.sources().prior
            found = self._calibrate(prior, narrow)
            root = next(path for path, network in networks_of(unet.call).items() if network is prior.unet)
            layers = {f"{root}.{name}": amax for name, amax in found.items()}
            self._quantised[narrow] = quantised(graph, layers, narrow)
        return self._quantised[narrow]


def identity(network: str, sources: Sources) -> dict[str, str]:
    """Digests of the networks in memory that an engine holds: what an engine that is loaded must agree with.

    Of each network's own weights, so that a change of one leaves the engines of the others as they are.
    """
    found = {}
    if network == "unet":
        found["unet_digest"] = _digest(sources.prior.unet)
    if network in OF_DECODER:
        found["decoder_digest"] = _digest(sources.prior.vae, without=("encoder.", "quant_conv."))
    if network in OF_TEACHER:
        assert sources.teacher is not None
        found["teacher_digest"] = _digest(sources.teacher.module)
    return found


def _digest(network: nn.Module, without: tuple[str, ...] = ()) -> str:
    """SHA-256 of names and bytes of weights and buffers, but those whose names begin with one of `without`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if not name.startswith(without):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _together(digests: Sequence[str]) -> str:
    """One digest of several; of one alone, itself."""
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _part(request: Request, prefix: str) -> tuple[tuple[str, str], ...]:
    return pairs({k.removeprefix(prefix): v for k, v in request.recipe.items() if k.startswith(prefix)})


def _judged(request: Request, made: Function, graph: Graph, engine: Engine, sources: Sources) -> dict[str, Any]:
    """Errors against float64; of a quantised engine also eager's, and how far it is from its graph run eagerly.

    Raises EngineError where they miss the tolerance: the engine is not saved.
    """
    narrow = request.quantised != "none"
    precision = request.quantised if narrow else request.recipe["dtype"]
    tolerance = TOLERANCE[made.kind, precision]
    doubled = sources.doubled()
    exact = function(request.network, doubled)
    sizes = [min(rows, request.batch[2]) for rows in JUDGED_ROWS]
    batches = [samples(request.network, sources, rows, SEED + i) for i, rows in enumerate(sizes)]
    # the loss scale is a power of two and no part of the result
    want, eager = _without_grad(exact.call), _without_grad(made.call)
    parity = measure(engine, want, eager, batches, made.kind, precision)
    if (problem := parity.problem(tolerance)) is not None:
        why = f"against float64 {problem}"
        raise EngineError(f"{request} is not saved", why, "report it, and use another backend for this network")
    found = {"parity": parity.to_json()}
    if narrow:
        found["parity_unquantised"] = measure(eager, want, eager, batches, made.kind, precision).to_json()
        of_graph = measure(engine, lambda *x: graph(*_narrowed(x, graph)), eager, batches, made.kind, precision)
        found["parity_with_simulation"] = of_graph.to_json()
    return found


def _narrowed(doubles: tuple[Tensor, ...], graph: Graph) -> list[Tensor]:
    """Arguments in float64 as the graph takes them; they were so before."""
    return [x.to(getattr(torch, spec.dtype)) for x, spec in zip(doubles, graph.inputs, strict=True)]


def _without_grad(call: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return call(*tensors)

    return run


def _rows_exact(request: Request, engine: Engine, sources: Sources) -> bool:
    """Whether a row's result has the same bits in calls of all sizes that dfkd-generate makes.

    Never so for a whole group's gradient, where rows depend on one another, nor claimed where the calls that were
    planned are too small to compare two sizes.
    """
    rows = min(request.timed, 2 * CUT_ROWS[-1])
    if rows < min(request.batch[2], CUT_ROWS[1]):
        return False
    arguments = samples(request.network, sources, rows, SEED)
    batched = [spec.shape[:1] == (None,) for spec in engine.spec.inputs]

    def part(start: int, stop: int) -> tuple[Tensor, ...]:
        return engine(*(x[start:stop] if cut else x for x, cut in zip(arguments, batched, strict=True)))

    whole = part(0, rows)
    for size in (size for size in CUT_ROWS if size < rows):
        first, last = part(0, size), part(rows - size, rows)
        for together, head, tail in zip(whole, first, last, strict=True):
            if not torch.equal(together[:size], head) or not torch.equal(together[-size:], tail):
                return False
    return True


def _timed(request: Request, engine: Engine, sources: Sources, kernels: str) -> dict[str, Any]:
    """Milliseconds of a call as the options plan it, engine and eager in turns on the same tensors.

    Eager with the kernels of a run without the engine, so that `auto` takes whichever was quicker here.
    """
    rows, made = request.timed, function(request.network, replace(sources, kernels=kernels))
    arguments = samples(request.network, sources, rows, SEED)
    with running((sources.prior.unet, sources.prior.vae), kernels):
        ways: dict[str, Callable[..., tuple[Tensor, ...]]] = {"engine": engine, "eager": _without_grad(made.call)}
        found = _in_turns(ways, arguments, sources.prior.device)
    return {**found, "rows": rows, "threads": torch.get_num_threads(), "kernels": kernels}


def _quicker(
    backend: Backend,
    graphs: Mapping[str, Graph],
    spec: EngineSpec,
    folder: Path,
    place: torch.device,
    arguments: tuple[Tensor, ...],
) -> dict[str, Any]:
    """Compile every graph and keep the quicker engine in `folder`; which it is, and milliseconds a call of each."""
    ways = {}
    for name, graph in graphs.items():
        (folder / name).mkdir()
        backend.compile(graph, spec, folder / name)
        ways[name] = Engine(spec, backend.load(folder / name, spec, place), place)
    milliseconds = _in_turns(ways, arguments, place)
    kept = min(milliseconds, key=lambda name: milliseconds[name])
    ways.clear()  # before their files go
    for file in (folder / kept).iterdir():
        file.rename(folder / file.name)
    for name in graphs:
        shutil.rmtree(folder / name)
    return {"kept": kept, "milliseconds": milliseconds}


def _in_turns(
    ways: Mapping[str, Callable[..., tuple[Tensor, ...]]], arguments: tuple[Tensor, ...], device: torch.device
) -> dict[str, float]:
    """Milliseconds a call of each way, the median of TIMED_TURNS after one to warm up."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TIMED_TURNS + 1):
        for name, call in ways.items():
            started = time.perf_counter()
            call(*arguments)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                spent[name].append(1000 * (time.perf_counter() - started))
    return {name: round(median(values), 2) for name, values in spent.items()}
