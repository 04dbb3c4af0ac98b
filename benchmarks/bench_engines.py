"""Eager, channels_last, torch.compile and the stored backends: every function of a run at several sizes of a call.

    python -m benchmarks.bench_engines                                      the demo's, on a CPU
    python -m benchmarks.bench_engines --sd15 512 --device cuda --dtype fp16 --rows 4,16         random weights

    eager            PyTorch's own kernels, weights in the order of NCHW
    channels_last    the same in the order of NHWC, as dfkd-generate has them
    torch.compile    inductor in this process, on the traced graph
    inductor, ...    the stored backends, compiled as dfkd-engines does, once, for calls up to the largest of --rows

Functions are those of dfkd/synthesis/functions.py. Errors are against eager float64 (engine/dfkd_engine/parity.py), on
a few rows; the same run counts the FLOP.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import driver
from benchmarks.driver import Group, Work
from benchmarks.flops import counted
from benchmarks.recording import names_of
from dfkd.compiled.engines import engine_spec
from dfkd.compiled.functions import Call, Function
from dfkd.config import DTYPES, GenerateConfig
from dfkd.errors import UsageError
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


def function_of(pipe: GuidedPipeline, name: str) -> Function:
    """One of a pipeline's functions. Raises LookupError where it has none of that name."""
    found = {function.name: function for function in pipe.functions()}
    if name not in found:
        raise LookupError(f"these settings have no {name}, but {', '.join(found)}")
    return found[name]


class Part:
    """A function of a pipeline with PLAIN, and the ways to run it, each made once.

    planned: the largest call, which compilers plan for; any from 2 to it can be run. folder: for what they write.
    """

    def __init__(self, pipe: GuidedPipeline, name: str, planned: int, folder: Path) -> None:
        self.pipe, self.name, self.planned, self.folder = pipe, name, planned, folder
        self.way = cache(self._way)

    @cached_property
    def function(self) -> Function:
        return function_of(self.pipe, self.name)

    @cached_property
    def graph(self) -> Graph:
        outputs = [output.name for output in self.function.outputs]
        return trace(self.function.call, self.function.inputs, output_names=outputs, device=self.pipe.device)

    @cached_property
    def exact(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], float]:
        """Arguments of JUDGED_ROWS, the results in float64 by eager autograd, and the FLOP of a row."""
        judged = self.function.samples(JUDGED_ROWS, SEED + 1)
        doubles = (x.double() if x.is_floating_point() else x for x in judged)
        want, flop = counted(self.function.exact(), *doubles)
        return judged, want, flop / JUDGED_ROWS

    def work(self, way: str, rows: int) -> Work:
        """Calls of so many rows. Raises UsageError where the way is not there, and whatever a compiler raises."""
        call, facts = self.way(way)
        return Work(partial(call, *self.function.samples(rows, SEED)), rows, rows * self.exact[2], facts)

    def _way(self, way: str) -> tuple[Call, dict[str, Any]]:
        if way == "eager":
            call, facts = without_grad(function_of(contiguous(self.pipe), self.name).call), {}
        elif way == "channels_last":
            call, facts = without_grad(self.function.call), {}
        else:
            call, facts = self._compiled(way)
        return call, {**facts, "error": self._error(call)}

    def _compiled(self, way: str) -> tuple[Call, dict[str, Any]]:
        function, device, backend = self.function, self.pipe.device, get("inductor" if way == JIT else way)
        if (why := backend.unusable(device, function.dtype)) is not None:
            raise UsageError(why)
        graph, arguments = self.graph, function.samples(self.planned, SEED)
        started = time.perf_counter()
        if way == JIT:
            call: Call = without_grad(torch.compile(graph.module, dynamic=False))
        else:
            spec = replace(engine_spec(function, way, architecture(device)), rows=(1, self.planned, self.planned))
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            compile_graph(backend, graph, spec, folder)
            call = Engine(spec, backend.load(folder, spec, device), device)
        call(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return call, {"compile s": time.perf_counter() - started}

    def _error(self, call: Call) -> float | str:
        """The worst of all results and rows; a word where it cannot be told."""
        judged, want, _ = self.exact
        eager, own = without_grad(self.function.call), self.function
        try:
            return measure(call, lambda *_: want, eager, [judged], own.kind, own.dtype).relative
        except EngineError:
            return "on kinks"  # of the teacher's ReLUs, where eager float32 is off too


def contiguous(pipe: GuidedPipeline) -> GuidedPipeline:
    """The pipeline on copies of its networks whose weights are in the order of NCHW."""
    own = copy.deepcopy(pipe)
    for network in (own.prior.denoiser, own.prior.vae, own.teacher.module):
        network.to(memory_format=torch.contiguous_format)
    return own


def without_grad(call: Call) -> Call:
    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return call(*tensors)

    return run


def groups(
    pipe: GuidedPipeline, rows: Sequence[int], folder: Path, networks: Sequence[str] = NETWORKS,
    ways: Sequence[str] = WAYS,
) -> list[Group]:  # fmt: skip
    """A group for every function and size of a call."""
    parts = {network: Part(pipe, network, max(rows), folder) for network in networks}
    return [
        Group(
            f"{network}, {count} rows", "eager", {way: partial(part.work, way, count) for way in ways},
            dtype=pipe.prior.dtype,
        )
        for network, part in parts.items()
        for count in rows
    ]  # fmt: skip


def _rows(text: str) -> list[int]:
    found = [int(word) for word in text.split(",")]
    if min(found) < 2:
        raise argparse.ArgumentTypeError("compiled code takes 2 rows or more; an engine runs 1 as 2")
    return found


def main() -> None:
    parser = driver.parser(__doc__)
    parser.add_argument("--sd15", type=int, metavar="SIZE", help="Stable Diffusion 1.5 at this size, random weights")
    parser.add_argument("--thin", action="store_true", help="of --sd15, with few channels: a rehearsal, never recorded")
    parser.add_argument("--rows", type=_rows, default=[25, 100, 200], help="of a call (default 25,100,200)")
    parser.add_argument("--backends", type=names_of(WAYS), default=list(WAYS), help=f"default {','.join(WAYS)}")
    parser.add_argument("--networks", type=names_of(NETWORKS), default=list(NETWORKS), help="functions (default all)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the networks (default fp32)")
    a = parser.parse_args()
    if a.thin and (a.record or not a.sd15):
        parser.error("--thin is of --sd15, and not recorded")
    from benchmarks import demo, sd15  # they need diffusers, which a machine that measures kernels may lack

    if a.sd15:
        config = GenerateConfig.of(device=str(a.device), dtype=a.dtype, group=max(a.rows), refine_steps=1, **PLAIN)
        pipe = GuidedPipeline(sd15.make_prior(a.sd15, a.dtype, a.thin), sd15.make_teacher(a.thin), config)
    else:
        pipe = demo.pipeline(max(a.rows), a.device, dtype=a.dtype, **PLAIN)
    record = "engines" + ("" if a.dtype == "fp32" else f"-{a.dtype}") + (f"-sd15-{a.sd15}" if a.sd15 else "")
    note = f"Prior {pipe.prior.source}, {pipe.image_size}x{pipe.image_size}, {a.dtype}; error: against float64. "
    with tempfile.TemporaryDirectory() as folder:
        found = groups(pipe, a.rows, Path(folder), a.networks, a.backends)
        driver.run(found, a, "bench_engines", record, note)


if __name__ == "__main__":
    main()
