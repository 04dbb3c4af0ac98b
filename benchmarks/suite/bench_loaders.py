"""An epoch of batches from shards, ours beside what others read them with (benchmarks/loader_ways.py).

Cropped, flipped, normalised float32 batches; `resident` has decoded everything before it begins.
"""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.bench_loader import BATCH, SETS, make_folder
from benchmarks.loader_ways import OTHERS, OURS, Epoch, epoch_of
from benchmarks.suite.case import Group, Place, Work

WORKERS = 2  # processes or threads that decode
QUICK = ("32 png", 1024)  # the set, and its images


def images(name: str, quick: bool) -> int:
    return QUICK[1] if quick else SETS[name][2]


def count(epoch: Epoch) -> int:
    return sum(len(batch) for batch in epoch())


def loader(name: str, way: str, place: Place) -> Work:
    side, image_format, _ = SETS[name]
    wanted = images(name, place.quick)
    folder = make_folder(place.folder / name.replace(" ", "-"), side, image_format, wanted)
    epoch = epoch_of(way, folder, BATCH, WORKERS)
    if (seen := count(epoch)) != wanted:
        raise RuntimeError(f"{seen} of {wanted} images came")
    return Work(partial(count, epoch), wanted)


def groups(device: torch.device, quick: bool) -> list[Group]:
    sets = [QUICK[0]] if quick else list(SETS)
    return [
        Group(f"loader, {name}", OTHERS[0], {way: partial(loader, name, way) for way in (*OTHERS, *OURS)}, "images")
        for name in sets
    ]


def test_loader(paired: Callable[[], None]) -> None:
    paired()
