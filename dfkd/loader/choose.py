"""Which source a run takes, and why."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from dfkd.loader.contract import Form, Images, Source
from dfkd.loader.resident import Resident
from dfkd.loader.workers import Workers

SOURCES = ("auto", "resident", "torch")
# The share of free memory that the resident source may take: networks and activations need the rest.
RESIDENT_SHARE = 0.25


@dataclass(frozen=True)
class LoaderChoice:
    """name: "resident" or "torch". why: for people."""

    name: str
    why: str


def choose(wanted: str, images: int, size: int, device: torch.device) -> LoaderChoice:
    """What `wanted` of SOURCES comes to for so many images of size x size."""
    needed = images * 3 * size * size
    text = f"{images} images of {size}x{size} are {needed / 1e6:.1f} MB"
    if wanted != "auto":
        return LoaderChoice(wanted, f"as asked; {text}")
    free = _free_memory(device)
    room = f"a quarter of the free memory of {device} is {RESIDENT_SHARE * free / 1e6:.0f} MB"
    return LoaderChoice("resident" if needed <= RESIDENT_SHARE * free else "torch", f"{text}, {room}")


def open_source(
    choice: LoaderChoice, data: Images, positions: Tensor, form: Form, kind: str, rows: int, workers: int
) -> Source:
    """The source by its name, for the images at ``positions`` int64 [n]; steps name them by 0 to n - 1.

    kind: of the views; rows: the largest batch; workers: processes or threads that decode.
    """
    if choice.name == "resident":
        return Resident(data, positions, form)
    return Workers(data, positions, form, workers)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
