"""From noise to images with the demo's networks: the rows of benchmarks/bench_sampling.py.

Guided rows beside the published loop, one image at a time; unguided sampling beside diffusers, compiled in the full
suite alone.
"""

from collections.abc import Callable
from functools import cache, partial

import torch

from benchmarks.bench_sampling import BASES, NAMES, PEERS, Networks, demo_networks, made
from benchmarks.suite.case import Absent, Group, Place, Work
from dfkd_engine.backends import get


@cache
def networks(place: Place) -> tuple[Networks, int]:
    images = 16 if place.quick else 64
    found = demo_networks(images, place.device)
    return (Networks(found.prior, found.teacher, found.config.replace(steps=4)) if place.quick else found), images


def row(name: str, place: Place) -> Work:
    return Work(*made(name, *networks(place)))


@cache  # compiling takes its time: a second turn has the same pipeline
def compiled(place: Place) -> Work:
    if (why := get("inductor").unusable(place.device, "float32")) is not None:
        raise Absent(why)
    return row(PEERS[1], place)


def groups(device: torch.device, quick: bool) -> list[Group]:
    of = {"published": "synthesis", PEERS[0]: "unguided sampling"}
    makes: dict[str, Callable[[Place], Work]] = {name: partial(row, name) for name in NAMES if name != PEERS[1]}
    makes |= {} if quick else {PEERS[1]: compiled}
    return [
        Group(of[base], base, {name: make for name, make in makes.items() if BASES[name] == base}, "images")
        for base in of
    ]


def test_synthesis(paired: Callable[[], None]) -> None:
    paired()
