"""The demo's networks as they run: eager, channels_last, and compiled (benchmarks/engine_ways.py has what each is)."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import torch

from benchmarks.engine_ways import WAYS, make_ways
from benchmarks.suite import demo
from benchmarks.suite.case import Absent, Group, Place, Work
from dfkd.compiled.functions import samples

NETWORKS = ("unet", "decode", "gradient", "pixel_gradient")
EAGER = ("eager", "channels_last")
IN_SECONDS = ("decode",)  # ONNX Runtime has it ready in a few; the quick suite compiles nothing else


@cache  # compilers take their time: a second turn has the same engine
def engine(network: str, name: str, place: Place) -> Work:
    sources, rows = demo.sources(place.folder, place.device), demo.images(place)
    folder = Path(mkdtemp(dir=place.folder))
    (way,) = make_ways((name,), network, sources, rows, folder)
    if way.call is None:
        raise Absent(way.why)
    return Work(partial(way.call, *samples(network, sources, rows, 0)), rows)


def ways(network: str, quick: bool) -> tuple[str, ...]:
    if not quick:
        return WAYS
    return (*EAGER, "onnxruntime") if network in IN_SECONDS else EAGER


def groups(device: torch.device, quick: bool) -> list[Group]:
    return [
        Group(
            f"network {network}",
            "eager",
            {name: partial(engine, network, name) for name in ways(network, quick)},
            "images",
        )
        for network in NETWORKS
    ]


def test_engine(paired: Callable[[], None]) -> None:
    paired()
