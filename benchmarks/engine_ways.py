"""The ways to run one function that bench_engines compares, each made ready or with the reason why it cannot be.

eager            torch's kernels, weights contiguous
channels_last    the same with the networks as dfkd-generate has them: NHWC weights
torch.compile    inductor in this process; it reads its weights at every call
inductor, ...    the stored backends, compiled and loaded as dfkd-engines does
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.flops import reason
from dfkd.compiled.functions import Function, Sources, function, samples
from dfkd_engine.architecture import architecture
from dfkd_engine.backends import BACKENDS, get
from dfkd_engine.backends.inductor import jit
from dfkd_engine.compiled import Engine
from dfkd_engine.graph import Graph, trace
from dfkd_engine.spec import EngineSpec, pairs

Call = Callable[..., tuple[Tensor, ...]]

JIT = "torch.compile"
WAYS = ("eager", "channels_last", JIT, *(name for name, backend in BACKENDS.items() if backend.stored))


@dataclass(frozen=True)
class Way:
    """call: None where it cannot run, and `why` says why.

    compile_seconds: from the traced graph to the first result; None where nothing is compiled.
    """

    name: str
    call: Call | None = None
    compile_seconds: float | None = None
    why: str | None = None


def make_ways(names: tuple[str, ...], network: str, sources: Sources, planned: int, folder: Path) -> Iterator[Way]:
    """The ways `names` of WAYS for one of dfkd.compiled.functions.NETWORKS, one after another.

    planned: the largest batch, which compilers plan for; any from 2 to it can be run. folder: for what they write.
    """
    made = function(network, sources)

    @cache
    def graph() -> Graph:
        return trace(made.call, made.inputs, output_names=made.outputs, device=sources.prior.device)

    for name in names:
        try:
            if name == "eager":
                yield Way(name, without_grad(function(network, contiguous(sources)).call))
            elif name == "channels_last":
                yield Way(name, without_grad(made.call))
            else:
                yield _compiled(name, network, made, sources, graph, planned, folder / name)
        except Exception as error:  # compilers raise what they like
            yield Way(name, why=reason(error))


def contiguous(sources: Sources) -> Sources:
    """Copies of the networks with NCHW weights."""
    prior, teacher = sources.prior, sources.teacher
    own = replace(prior, unet=_contiguous(prior.unet), vae=_contiguous(prior.vae))
    return replace(sources, prior=own, teacher=teacher and replace(teacher, module=_contiguous(teacher.module)))


def without_grad(call: Call) -> Call:
    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return call(*tensors)

    return run


def _compiled(
    name: str, network: str, made: Function, sources: Sources, graph: Callable[[], Graph], planned: int, folder: Path
) -> Way:
    device, dtype = sources.prior.device, str(sources.prior.dtype).removeprefix("torch.")
    backend = get("inductor" if name == JIT else name)
    if (why := backend.unusable(device, dtype)) is not None:
        return Way(name, why=why)
    traced = graph()
    arguments = samples(network, sources, planned, 0)
    started = time.perf_counter()
    if name == JIT:
        call: Call = jit(traced)
    else:
        spec = EngineSpec(
            network=network,
            graph=traced.structure(),
            weights=traced.weights(),
            inputs=traced.inputs,
            outputs=traced.outputs,
            batch=(1, planned, planned),
            dtype=dtype,
            backend=name,
            versions=pairs(backend.versions()),
            device=architecture(device),
            flags=pairs(backend.flags(device)),
        )
        folder.mkdir(parents=True)
        backend.compile(traced, spec, folder)
        call = Engine(spec, backend.load(folder, spec, device), device)
    call(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Way(name, call, time.perf_counter() - started)


def _contiguous(network: Any) -> Any:
    return copy.deepcopy(network).to(memory_format=torch.contiguous_format)
