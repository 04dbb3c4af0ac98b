"""A step of distillation in the ways of benchmarks/bench_distill.py, images on the device ready."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.bench_distill import WAYS, Pair, defaults, made
from benchmarks.suite.case import Group, Place, Work


def step(way: str, of: Pair, place: Place) -> Work:
    return Work(made(way, of, place.device), of.batch)


def groups(device: torch.device, quick: bool) -> list[Group]:
    names = [name for name, own in WAYS.items() if not (quick and "compile" in own)]  # a quarter of a minute each
    return [
        Group(f"distillation, {of}", "eager", {name: partial(step, name, of) for name in names}, "images")
        for of in defaults(device)[: 1 if quick else None]
    ]


def test_distillation(paired: Callable[[], None]) -> None:
    paired()
