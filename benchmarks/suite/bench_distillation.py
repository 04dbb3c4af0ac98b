"""A step of distillation in the ways of benchmarks/bench_distill.py, images on the device ready."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.bench_distill import Pair, defaults, made, ways
from benchmarks.suite.case import Absent, Group, Place, Work
from dfkd_engine.backends import get

SLOW_TO_MAKE = ("compile", "all")  # the quick suite leaves them out: compilers take a quarter of a minute each


def step(name: str, of: Pair, place: Place) -> Work:
    if name in SLOW_TO_MAKE and (why := get("inductor").unusable(place.device, "float32")):
        raise Absent(why)
    return Work(made(ways(place.device)[name], of, place.device), of.batch)


def groups(device: torch.device, quick: bool) -> list[Group]:
    names = [name for name in ways(device) if not (quick and name in SLOW_TO_MAKE)]
    return [
        Group(
            f"distillation, {of.teacher} to {of.student}", "eager", {n: partial(step, n, of) for n in names}, "images"
        )
        for of in defaults(device, False)[: 1 if quick else None]
    ]


def test_distillation(paired: Callable[[], None]) -> None:
    paired()
