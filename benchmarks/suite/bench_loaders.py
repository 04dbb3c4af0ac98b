"""An epoch of batches from shards, ours beside what others read them with (benchmarks/loader_ways.py).

Cropped, flipped, normalised float32 batches; `resident` has decoded everything before it begins.
"""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.bench_loader import SETS, counting, make_folder
from benchmarks.loader_ways import OTHERS, OURS
from benchmarks.suite.case import Group, Place, Work

WORKERS = 2  # processes or threads that decode
QUICK = {"32 png": (32, "png", 1024)}


def loader(name: str, way: str, place: Place) -> Work:
    side, image_format, images = (QUICK if place.quick else SETS)[name]
    folder = make_folder(place.folder / name.replace(" ", "-"), side, image_format, images)
    return Work(counting(way, folder, images, WORKERS, place.device), images)


def groups(device: torch.device, quick: bool) -> list[Group]:
    return [
        Group(f"loader, {name}", OTHERS[0], {way: partial(loader, name, way) for way in (*OTHERS, *OURS)}, "images")
        for name in (QUICK if quick else SETS)
    ]


def test_loader(paired: Callable[[], None]) -> None:
    paired()
