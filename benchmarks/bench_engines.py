"""Eager, channels_last, torch.compile and the stored backends: every function of a run at several sizes of a call.

    python -m benchmarks.bench_engines                                      the demo's, on a CPU
    python -m benchmarks.bench_engines --sd15 512 --device cuda --dtype fp16 --rows 4,16         random weights

    eager            PyTorch's own kernels, weights in the order of NCHW
    channels_last    the same in the order of NHWC, as dfkd-generate has them
    torch.compile    inductor in this process, on the traced graph
    inductor, ...    the stored backends, compiled as dfkd-engines does, once, for calls up to the largest of --rows

Functions are those of dfkd/synthesis/functions.py. All ways to run one are timed in turns in one process, with a square
matmul in every turn; ratios to eager and shares of the matmul are taken within a turn. Errors are against eager float64
(engine/dfkd_engine/parity.py), on a few rows. What cannot run is listed with its reason.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.flops import counted, in_turns, matmuls, peak, precision, reason
from benchmarks.machine import describe
from benchmarks.recording import (
    finish,
    names_of,
    not_measured,
    number,
    percent,
    ratios,
    scaled,
    spread,
    table,
    taken_on,
    words,
)
from dfkd.compiled.engines import engine_spec
from dfkd.compiled.functions import Call, Function
from dfkd.config import DTYPES, GenerateConfig
from dfkd.runtime import resolve_device
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd_engine.backends import BACKENDS, compile_graph, get
from dfkd_engine.compiled import Engine
from dfkd_engine.devices import architecture
from dfkd_engine.errors import EngineError
from dfkd_engine.graph import Graph, trace
from dfkd_engine.parity import measure

SEED = 0
JUDGED_ROWS = 2  # a 512-pixel decoder's float64 activations and their gradients take 12 GB an image
NETWORKS = ("unet", "decode", "gradient", "pixel_gradient")
JIT = "torch.compile"
WAYS = ("eager", "channels_last", JIT, *BACKENDS)
PLAIN = {"kernels": "torch", "attention": "sdpa", "backend": "eager"}  # settings of the pipelines whose parts run here


@dataclass(frozen=True)
class Way:
    """A way to run a function. call: None where it cannot run, and `why` says why.

    compile_seconds: from the traced graph to the first result; None where nothing is compiled.
    """

    name: str
    call: Call | None = None
    compile_seconds: float | None = None
    why: str | None = None


def function_of(pipe: GuidedPipeline, name: str) -> Function:
    """One of a pipeline's functions. Raises LookupError where it has none of that name."""
    found = {function.name: function for function in pipe.functions()}
    if name not in found:
        raise LookupError(f"these settings have no {name}, but {', '.join(found)}")
    return found[name]


def make_ways(names: Sequence[str], network: str, pipe: GuidedPipeline, planned: int, folder: Path) -> Iterator[Way]:
    """The ways `names` of WAYS for a function of a pipeline that has PLAIN, one after another.

    planned: the largest call, which compilers plan for; any from 2 to it can be run. folder: for what they write.
    """
    function = function_of(pipe, network)

    @cache
    def graph() -> Graph:
        outputs = [output.name for output in function.outputs]
        return trace(function.call, function.inputs, output_names=outputs, device=function.device)

    for name in names:
        try:
            if name == "eager":
                yield Way(name, without_grad(function_of(contiguous(pipe), network).call))
            elif name == "channels_last":
                yield Way(name, without_grad(function.call))
            else:
                yield _compiled(name, function, graph, planned, folder / name)
        except Exception as error:  # compilers raise what they like
            yield Way(name, why=reason(error))


def contiguous(pipe: GuidedPipeline) -> GuidedPipeline:
    """The pipeline on copies of its networks whose weights are in the order of NCHW."""
    own = copy.deepcopy(pipe)
    for network in (own.prior.unet, own.prior.vae, own.teacher.module):
        network.to(memory_format=torch.contiguous_format)
    return own


def without_grad(call: Call) -> Call:
    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return call(*tensors)

    return run


def _compiled(name: str, function: Function, graph: Callable[[], Graph], planned: int, folder: Path) -> Way:
    device, backend = function.device, get("inductor" if name == JIT else name)
    if (why := backend.unusable(device, function.dtype)) is not None:
        return Way(name, why=why)
    traced, arguments = graph(), function.samples(planned, SEED)
    started = time.perf_counter()
    if name == JIT:
        call: Call = without_grad(torch.compile(traced.module, dynamic=False))
    else:
        spec = replace(engine_spec(function, name, architecture(device)), rows=(1, planned, planned))
        folder.mkdir(parents=True)
        compile_graph(backend, traced, spec, folder)
        call = Engine(spec, backend.load(folder, spec, device), device)
    call(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Way(name, call, time.perf_counter() - started)


def bench(
    pipe: GuidedPipeline, networks: Sequence[str], names: Sequence[str], rows: Sequence[int], turns: int
) -> Iterator[dict[str, Any]]:
    """The result without the machine, after every network as far as it is: "rows" and, with reasons, "failures".

    pipe: with the settings PLAIN.
    """
    device, dtype = pipe.device, pipe.prior.dtype
    result: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."), "precision": precision(device, dtype),
        "peak_flop_per_second": peak(device, dtype), "prior": pipe.prior.source,
        "teacher": pipe.teacher.architecture, "image_size": pipe.image_size, "turns": turns, "planned_rows": max(rows),
        "versions": {name: own.versions() for name, own in BACKENDS.items() if name in names},
        "matmul_flop_per_second": {}, "rows": [], "failures": [],
    }  # fmt: skip
    speeds: dict[str, list[float]] = {}
    for network in networks:
        try:
            with tempfile.TemporaryDirectory() as folder:
                _bench_network(result, speeds, network, pipe, names, rows, Path(folder))
        except Exception as error:  # such as too little memory for float64: the other networks are measured still
            result["failures"].append({"network": network, "rows": None, "backend": "all", "why": reason(error)})
        result["matmul_flop_per_second"] = {name: median(found) for name, found in speeds.items()}
        yield result


def _bench_network(
    result: dict[str, Any], speeds: dict[str, list[float]], network: str, pipe: GuidedPipeline,
    names: Sequence[str], rows: Sequence[int], folder: Path,
) -> None:  # fmt: skip
    function = function_of(pipe, network)
    judged = function.samples(JUDGED_ROWS, SEED + 1)
    want, flop = counted(function.exact(), *(x.double() if x.is_floating_point() else x for x in judged))
    ways = {}
    for way in make_ways(names, network, pipe, max(rows), folder):
        _say(f"{network} {way.name}: {way.why or 'ready'}")
        if way.call is None:
            result["failures"].append({"network": network, "rows": None, "backend": way.name, "why": way.why})
        else:
            ways[way.name] = way, error_of(way.call, function, judged, want)
    ceilings, precise = matmuls(pipe.device, pipe.prior.dtype), result["precision"]
    for count in rows:
        arguments, work = function.samples(count, SEED), count * flop / JUDGED_ROWS
        calls: dict[str, Any] = {name: partial(way.call, *arguments) for name, (way, _) in ways.items()}
        matmul = {f"{name} matmul": run for name, (run, _) in ceilings.items()}
        seconds, failed = in_turns(calls | matmul, result["turns"], pipe.device)
        for name, (_, whole) in ceilings.items():
            speeds.setdefault(name, []).extend(whole / s for s in seconds[f"{name} matmul"])
        ceiling = [ceilings[precise][1] / s for s in seconds[f"{precise} matmul"]]
        for name, (way, error) in ways.items():
            here = {"network": network, "rows": count, "backend": name}
            if name in failed:
                result["failures"].append(here | {"why": failed[name]})
                continue
            speed = row(seconds[name], seconds.get("eager"), work, ceiling)
            result["rows"].append(here | speed | {"compile_seconds": way.compile_seconds} | error)
            _say(f"{network} {count} rows {name}: {words(speed['ms'])} ms")


def row(seconds: list[float], eager: list[float] | None, flop: float, ceiling: list[float]) -> dict[str, Any]:
    """Numbers of one way at one size of call; `eager` (seconds) and `ceiling` (FLOP/s) are of the same turns."""
    speeds = [flop / s for s in seconds]
    return {
        "ms": spread([1000 * s for s in seconds]),
        "ratio": ratios(eager, seconds),
        "flop": flop,
        "flop_per_second": median(speeds),
        "share_of_matmul": median(speed / limit for speed, limit in zip(speeds, ceiling, strict=True)),
    }


def error_of(call: Call, function: Function, judged: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> dict[str, Any]:
    """relative_error and cosine, the worst of all results and rows; None where `quality` says why."""
    try:
        found = measure(call, lambda *_: want, without_grad(function.call), [judged], function.kind, function.dtype)
    except EngineError as error:
        return {"relative_error": None, "cosine": None, "quality": str(error)}
    note = f"{found.kinks} of {JUDGED_ROWS} rows sit on a kink" if found.kinks else None
    return {"relative_error": found.relative, "cosine": found.cosine, "quality": note}


def markdown(result: dict[str, Any]) -> str:
    """The table of a recorded result, with what could not run below it."""
    heads = ["function", "rows", "backend", "ms: median (min to max)", "ratio", "FLOP", "FLOP/s", "of matmul", "MFU"]
    limit = result["peak_flop_per_second"]
    cells = [
        [
            r["network"], r["rows"], r["backend"], words(r["ms"]), r["ratio"] and number(r["ratio"]["median"]),
            scaled(r["flop"]), scaled(r["flop_per_second"]), percent(r["share_of_matmul"]),
            percent(r["flop_per_second"] / limit if limit else None),
            r["relative_error"] and f"{r['relative_error']:.1e}", r["compile_seconds"] and number(r["compile_seconds"]),
        ]
        for r in result["rows"]
    ]  # fmt: skip
    ceilings = ", ".join(f"{name} {scaled(s, 'FLOP/s')}" for name, s in result["matmul_flop_per_second"].items())
    under = (
        f"Prior {result['prior']} in {result['dtype']}, images {result['image_size']}x{result['image_size']}, teacher "
        f"{result['teacher']}; ratio: times as fast as eager; matmul: {result['precision']} (measured: {ceilings}); "
        f"error: against float64. {result['turns']} turns, "
    )
    failed = [(_where(f), f["why"]) for f in result["failures"]]
    last = [r for r in result["rows"] if r["rows"] == result["planned_rows"] and r["relative_error"] is None]
    failed += [(f"error of {_where(r)}", r["quality"]) for r in last]
    lines = table([*heads, "error", "compile s"], cells)
    lines += ["", under + taken_on(result["machine"], "python -m benchmarks.bench_engines")]
    return "\n".join(lines + not_measured(failed))


def _where(found: dict[str, Any]) -> str:
    at = f" at {found['rows']} rows" if found["rows"] else ""
    return f"{found['backend']} ({found['network']}{at})"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _rows(text: str) -> list[int]:
    found = [int(word) for word in text.split(",")]
    if min(found) < 2:
        raise argparse.ArgumentTypeError("compiled code takes 2 rows or more; an engine runs 1 as 2")
    return found


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd15", type=int, metavar="SIZE", help="Stable Diffusion 1.5 at this size, random weights")
    parser.add_argument("--thin", action="store_true", help="of --sd15, with few channels: a rehearsal, never recorded")
    parser.add_argument("--rows", type=_rows, default=[25, 100, 200], help="of a call (default 25,100,200)")
    parser.add_argument("--backends", type=names_of(WAYS), default=list(WAYS), help=f"default {','.join(WAYS)}")
    parser.add_argument("--networks", type=names_of(NETWORKS), default=list(NETWORKS), help="functions (default all)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default 5)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the networks (default fp32)")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/engines-<device>.json")
    return parser


def pipeline_of(a: argparse.Namespace, device: torch.device) -> GuidedPipeline:
    """Of the demo's networks, or of Stable Diffusion 1.5's with random weights and a ResNet-34."""
    from benchmarks import demo, sd15  # they need diffusers, which a machine that only writes the tables may lack

    if not a.sd15:
        return demo.pipeline(max(a.rows), device, dtype=a.dtype, **PLAIN)
    config = GenerateConfig.of(device=str(device), dtype=a.dtype, group=max(a.rows), refine_steps=1, **PLAIN)
    return GuidedPipeline(sd15.make_prior(a.sd15, a.dtype, a.thin), sd15.make_teacher(a.thin), config)


def main() -> None:
    a = arguments_parser().parse_args()
    if a.thin and (a.record or not a.sd15):
        sys.exit("error: --thin is of --sd15, and not recorded")
    device = resolve_device(a.device)
    machine, result = describe(device), {}  # before the work: what fails here must not lose it
    for found in bench(pipeline_of(a, device), a.networks, a.backends, a.rows, a.repeats):
        result = {"machine": machine, **found}
        print(json.dumps(result), flush=True)  # for who stops it; the last line is the whole
    stem = "engines" + ("" if a.dtype == "fp32" else f"-{a.dtype}") + (f"-sd15-{a.sd15}" if a.sd15 else "")
    finish(result, markdown(result), stem if a.record else "")


if __name__ == "__main__":
    main()
