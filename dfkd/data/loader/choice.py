"""Which source a run takes, and why."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from dfkd.errors import UsageError
from dfkd.data.loader import dali
from dfkd.data.loader.contract import Form, Images, Source
from dfkd.data.loader.pixels import Decoded
from dfkd.data.loader.resident import Resident
from dfkd.data.loader.workers import Workers

SOURCES = ("auto", "dali", "resident", "torch")
NOT_INSTALLED = "NVIDIA DALI is not installed (pip install 'dfkd[dali]', Linux on x86-64)"
KEPT = "decoded once, kept in main memory"
STREAMED = "decoded as they are needed"
# The share of free memory that decoded images may take: networks and activations need the rest.
SHARE = 0.25


@dataclass(frozen=True)
class LoaderChoice:
    """name: "dali", "resident" or "torch". why: for people.

    kept: of dali, whether images are decoded once and stay in main memory; only their views are made at every step.
    """

    name: str
    why: str
    kept: bool = False


def choose(wanted: str, images: int, size: int, device: torch.device) -> LoaderChoice:
    """What `wanted` of SOURCES comes to for so many images of size x size; raises UsageError without DALI for dali.

    auto: what is small stays in memory, on the device, which makes the views; on a CPU too, where DALI would make them
    beside the step, but on the cores that the step has (benchmarks/bench_loader.py).
    What is large is decoded as it is needed, by DALI where it is installed.
    """
    needed = images * 3 * size * size
    text = f"{images} images of {size}x{size} are {needed / 1e6:.1f} MB"
    if wanted == "dali" and not dali.installed():
        raise UsageError("--loader dali", NOT_INSTALLED, "install it, or use --loader auto")
    if wanted in ("resident", "torch"):
        return LoaderChoice(wanted, f"as asked; {text}")
    place = device if wanted == "auto" else torch.device("cpu")
    free = _free_memory(place)
    room = f"a quarter of the free memory of {place} is {SHARE * free / 1e6:.0f} MB"
    fits = needed <= SHARE * free
    if wanted == "dali":
        # On a GPU the pixels would go there at every step; encoded they are fewer bytes.
        kept = fits and device.type == "cpu"
        return LoaderChoice("dali", f"as asked; {text}, {room}: {KEPT if kept else STREAMED}", kept)
    if fits:
        return LoaderChoice("resident", f"{text}, {room}")
    if not dali.installed():
        return LoaderChoice("torch", f"{text}, {room}; {NOT_INSTALLED}")
    return LoaderChoice("dali", f"{text}, {room}: {STREAMED}")


def open_source(
    choice: LoaderChoice, data: Images, positions: Tensor, form: Form, kind: str, rows: int, workers: int
) -> Source:
    """The source by its name, for the images at ``positions`` int64 [n]; steps name them by 0 to n - 1.

    kind: of the views; rows: the largest batch; workers: processes or threads that decode.
    """
    if choice.name == "resident":
        return Resident(data, positions, form)
    if choice.name == "dali":
        if choice.kept:
            data = Decoded(data, positions, form.size)
            positions = torch.arange(len(positions))
        return dali.Dali(data, positions, form, kind, rows, workers)
    return Workers(data, positions, form, workers)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
