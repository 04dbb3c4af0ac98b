"""Which source a run takes, and why."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from dfkd.errors import UsageError
from dfkd.loader import dali
from dfkd.loader.contract import Form, Images, Source
from dfkd.loader.resident import Resident
from dfkd.loader.workers import Workers

SOURCES = ("auto", "dali", "resident", "torch")
NOT_INSTALLED = "NVIDIA DALI is not installed (pip install 'dfkd[dali]', Linux on x86-64)"
# The share of free memory that the resident source may take: networks and activations need the rest.
RESIDENT_SHARE = 0.25


@dataclass(frozen=True)
class LoaderChoice:
    """name: "dali", "resident" or "torch". why: for people."""

    name: str
    why: str


def choose(wanted: str, images: int, size: int, device: torch.device) -> LoaderChoice:
    """What `wanted` of SOURCES comes to for so many images of size x size; raises UsageError without DALI for dali."""
    needed = images * 3 * size * size
    text = f"{images} images of {size}x{size} are {needed / 1e6:.1f} MB"
    if wanted == "dali" and not dali.installed():
        raise UsageError("--loader dali", NOT_INSTALLED, "install it, or use --loader auto")
    if wanted != "auto":
        return LoaderChoice(wanted, f"as asked; {text}")
    free = _free_memory(device)
    room = f"a quarter of the free memory of {device} is {RESIDENT_SHARE * free / 1e6:.0f} MB"
    if needed <= RESIDENT_SHARE * free:
        return LoaderChoice("resident", f"{text}, {room}")
    if dali.installed():
        return LoaderChoice("dali", f"{text}, {room}")
    return LoaderChoice("torch", f"{text}, {room}; {NOT_INSTALLED}")


def open_source(
    choice: LoaderChoice, data: Images, positions: Tensor, form: Form, kind: str, rows: int, workers: int
) -> Source:
    """The source by its name, for the images at ``positions`` int64 [n]; steps name them by 0 to n - 1.

    kind: of the views; rows: the largest batch; workers: processes or threads that decode.
    """
    if choice.name == "resident":
        return Resident(data, positions, form)
    if choice.name == "dali":
        return dali.Dali(data, positions, form, kind, rows, workers)
    return Workers(data, positions, form, workers)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
