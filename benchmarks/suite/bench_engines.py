"""The demo's networks as they run: eager, channels_last, and compiled (benchmarks/bench_engines.py has the ways)."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import torch

from benchmarks import demo
from benchmarks.bench_engines import NETWORKS, PLAIN, WAYS, function_of, make_ways
from benchmarks.suite.case import Absent, Group, Place, Work
from dfkd.synthesis.pipeline import GuidedPipeline

EAGER = WAYS[:2]
IN_SECONDS = ("decode",)  # ONNX Runtime has it ready in a few; the quick suite compiles nothing else


def images(place: Place) -> int:
    """Rows of a call."""
    return 16 if place.quick else 64


@cache
def pipeline(place: Place) -> GuidedPipeline:
    return demo.pipeline(images(place), place.device, **PLAIN)


@cache  # compilers take their time: a second turn has the same engine
def engine(network: str, name: str, place: Place) -> Work:
    pipe, rows = pipeline(place), images(place)
    (way,) = make_ways((name,), network, pipe, rows, Path(mkdtemp(dir=place.folder)))
    if way.call is None:
        raise Absent(way.why)
    return Work(partial(way.call, *function_of(pipe, network).samples(rows, 0)), rows)


def groups(device: torch.device, quick: bool) -> list[Group]:
    few = {network: (*EAGER, *(("onnxruntime",) if network in IN_SECONDS else ())) for network in NETWORKS}
    return [
        Group(f"network {network}", "eager", {name: partial(engine, network, name) for name in names}, "images")
        for network, names in (few if quick else dict.fromkeys(NETWORKS, WAYS)).items()
    ]


def test_engine(paired: Callable[[], None]) -> None:
    paired()
