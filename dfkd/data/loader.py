"""Sources of batches: which one a run takes and why, images in the device's memory, and images from worker processes.

DALI's is in dfkd.data.dali.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dfkd.data import dali
from dfkd.data.batches import Batch, Form, Images, Source, Step, read_pixels
from dfkd.data.shards import Pool
from dfkd.errors import UsageError

NOT_INSTALLED = "NVIDIA DALI is not installed (pip install 'dfkd[dali]', Linux on x86-64)"
KEPT = "decoded once, kept in main memory"
STREAMED = "decoded as they are needed"
SHARE = 0.25  # of free memory that decoded images may take: networks and activations need the rest


@dataclass(frozen=True)
class LoaderChoice:
    """name: "dali", "resident" or "torch". why: for people.

    kept: of dali, whether images are decoded once and stay in main memory; only their views are made at every step.
    """

    name: str
    why: str
    kept: bool = False


def choose_loader(wanted: str, images: int, size: int, device: torch.device) -> LoaderChoice:
    """What --loader `wanted` comes to for so many images of size x size; raises UsageError for dali without DALI.

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
    """The chosen source, for the images at ``positions`` int64 [n]; steps name them by 0 to n - 1.

    kind: of the views; rows: the largest batch; workers: processes or threads that decode.
    """
    if choice.name == "resident":
        return Resident(data, positions, form)
    if choice.name == "torch":
        return Workers(data, positions, form, workers)
    if choice.kept:
        pixels = read_pixels(data, positions, form.size, form.resize).permute(0, 3, 1, 2)
        data = Pool(pixels, data.labels[positions], data.ids[positions], data.class_names, digest=data.digest)
        positions = torch.arange(len(positions))
    return dali.Dali(data, positions, form, kind, rows, workers)


class Resident:
    """Every image as uint8 on the device; a batch is one gather there."""

    def __init__(self, data: Images, positions: Tensor, form: Form) -> None:
        self.form = form
        self.labels, self.ids = data.labels[positions].to(form.device), data.ids[positions]
        self._pool = read_pixels(data, positions, form.size, form.resize).to(form.device)

    def batches(self, steps: Iterable[Step]) -> Iterator[Batch]:
        for step in steps:
            rows = step.positions.to(self.form.device, non_blocking=True)
            images = self.form.finish(self._pool.index_select(0, rows), step.views)  # whole rows at once
            yield Batch(images, self.labels[rows], self.ids[step.positions], step.random)


class Workers:
    """Images decoded by worker processes as they are needed (torch.utils.data.DataLoader), viewed on the device.

    workers: processes; 0 decodes in this one, when a batch is asked for.
    """

    def __init__(self, data: Images, positions: Tensor, form: Form, workers: int) -> None:
        self.form = form
        self.labels, self.ids = data.labels[positions], data.ids[positions]
        self._plan = _Plan()
        self._loader: DataLoader[Tensor | UsageError] = DataLoader(
            _Rows(data, positions, form),
            batch_sampler=self._plan,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=form.device.type == "cuda",
            persistent_workers=workers > 0,
        )

    def batches(self, steps: Iterable[Step]) -> Iterator[Batch]:
        self._plan.begin(steps)
        for pixels in self._loader:
            if isinstance(pixels, UsageError):
                raise UsageError(*pixels.args)  # `pixels` itself would hold this frame, and its collection the workers
            step = self._plan.asked.popleft()
            images = self.form.finish(pixels.to(self.form.device, non_blocking=True), step.views)
            labels = self.labels[step.positions].to(self.form.device, non_blocking=True)
            yield Batch(images, labels, self.ids[step.positions], step.random)


class _Plan:
    """The steps as torch's loader draws them: the positions go to the workers, the steps themselves stay here."""

    def __init__(self) -> None:
        self._steps: Iterable[Step] = ()
        self.asked: deque[Step] = deque()

    def begin(self, steps: Iterable[Step]) -> None:
        self._steps = steps
        self.asked.clear()

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            self.asked.append(step)
            yield step.positions.tolist()


class _Rows(Dataset[Tensor | UsageError]):
    def __init__(self, data: Images, positions: Tensor, form: Form) -> None:
        self.data, self.positions, self.size, self.how = data, positions, form.size, form.resize

    def __getitems__(self, rows: list[int]) -> Tensor | UsageError:
        """uint8 [B, size, size, 3]; an error travels as a value, since a worker's traceback would bury its words."""
        try:
            return read_pixels(self.data, self.positions[rows], self.size, self.how)
        except UsageError as error:
            return error


def _as_is(batch: Any) -> Any:
    return batch


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
