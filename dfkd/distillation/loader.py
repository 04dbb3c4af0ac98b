"""Batches for distillation: one contract, two sources.

The images of a run are one stream, epoch after epoch, every epoch a permutation of the training positions; a batch is
the next ``batch_size`` of the stream, across the end of an epoch if need be, so that every batch (but a run's last)
has one size and each image is seen exactly once per epoch. The order is a pure function of (seed, epoch): any step can
be the first, and both sources give the same labels and ids, step by step.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dfkd.distillation.randomness import generator
from dfkd.errors import UsageError

# The share of free memory that the resident source may take: networks and activations need the rest.
RESIDENT_SHARE = 0.25
READ_ROWS = 1024


class Images(Protocol):
    """What dfkd.shards' Pool and ShardPool have in common."""

    @property
    def labels(self) -> Tensor: ...

    @property
    def ids(self) -> Tensor: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def digest(self) -> str: ...

    def read(self, positions: Tensor) -> Tensor:
        """uint8 [n, 3, H, W] at int64 [n] positions."""


@dataclass(frozen=True)
class Batch:
    """images float32 [B, 3, size, size] in 0..1, channels_last, on the device; labels int64 [B] there; ids int64 [B]
    in main memory."""

    images: Tensor
    labels: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Order:
    """Which positions of ``range(count)`` each step of a run takes; ``length`` images in all."""

    seed: int
    count: int
    batch_size: int
    length: int

    @property
    def steps(self) -> int:
        return -(-self.length // self.batch_size)

    def batch(self, step: int) -> Tensor:
        """Positions int64 [batch_size]; fewer in the last step where the length asks for it."""
        start, stop = step * self.batch_size, min((step + 1) * self.batch_size, self.length)
        parts = []
        while start < stop:
            epoch, first = divmod(start, self.count)
            parts.append(_permutation(self.seed, self.count, epoch)[first : first + stop - start])
            start += len(parts[-1])
        return torch.cat(parts)


class Loader(Protocol):
    def batches(self, start: int) -> Iterator[Batch]:
        """The batches of the steps from ``start`` to the run's last."""


class Resident:
    """All images as uint8 on the device; a batch is one gather."""

    def __init__(self, data: Images, positions: Tensor, order: Order, size: int, device: torch.device) -> None:
        self.order, self.device = order, device
        self.labels, self.ids = data.labels[positions], data.ids[positions]
        # Channels last in memory, so that a gathered batch is what convolutions want.
        self._pool = read_all(data, positions, size).permute(0, 2, 3, 1).contiguous().to(device)

    def batches(self, start: int) -> Iterator[Batch]:
        for step in range(start, self.order.steps):
            rows = self.order.batch(step)
            pixels = self._pool[rows.to(self.device, non_blocking=True)]
            yield Batch(_to_float(pixels), self.labels[rows].to(self.device), self.ids[rows])


class Streamed:
    """Images decoded by worker processes as they are needed (torch.utils.data.DataLoader)."""

    def __init__(
        self, data: Images, positions: Tensor, order: Order, size: int, device: torch.device, workers: int
    ) -> None:
        self.order, self.device, self.workers = order, device, workers
        self.labels, self.ids = data.labels[positions], data.ids[positions]
        self._rows = _Rows(data, positions, size)

    def batches(self, start: int) -> Iterator[Batch]:
        loader: DataLoader[Tensor | UsageError] = DataLoader(
            self._rows,
            batch_sampler=_Steps(self.order, start),
            num_workers=self.workers,
            collate_fn=_as_is,
            pin_memory=self.device.type == "cuda",
        )
        for step, pixels in enumerate(loader, start):
            if isinstance(pixels, UsageError):
                raise pixels
            rows = self.order.batch(step)
            yield Batch(
                _to_float(pixels.to(self.device, non_blocking=True)),
                self.labels[rows].to(self.device),
                self.ids[rows],
            )


def choose(wanted: str, images: int, size: int, device: torch.device) -> tuple[str, str]:
    """The source, resident or torch, and the reason in words."""
    needed = images * 3 * size * size
    text = f"{images} images of {size}x{size} are {needed / 1e6:.1f} MB"
    if wanted != "auto":
        return wanted, f"as asked; {text}"
    free = _free_memory(device)
    room = f"a quarter of the free memory of {device} is {RESIDENT_SHARE * free / 1e6:.0f} MB"
    return ("resident" if needed <= RESIDENT_SHARE * free else "torch"), f"{text}, {room}"


def read_all(data: Images, positions: Tensor, size: int) -> Tensor:
    """uint8 [n, 3, size, size] at int64 [n] positions."""
    return torch.cat([_resize(data.read(part), size) for part in torch.split(positions, READ_ROWS)])


class _Rows(Dataset[Tensor | UsageError]):
    def __init__(self, data: Images, positions: Tensor, size: int) -> None:
        self.data, self.positions, self.size = data, positions, size

    def __getitems__(self, rows: list[int]) -> Tensor | UsageError:
        """uint8 [B, size, size, 3]; an error travels as a value, since a worker's traceback would bury its words."""
        try:
            images = self.data.read(self.positions[rows])
        except UsageError as error:
            return error
        return _resize(images, self.size).permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class _Steps:
    order: Order
    start: int

    def __iter__(self) -> Iterator[list[int]]:
        return (self.order.batch(step).tolist() for step in range(self.start, self.order.steps))


def _as_is(batch: Any) -> Any:
    return batch


def _to_float(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2).float().div_(255)


def _resize(images: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, H, W] -> uint8 [B, 3, size, size], bicubic without antialiasing: what guidance showed the teacher.

    Once when read rather than at each step, and so that augmentation works in the pixels of the networks.
    """
    if images.shape[-2:] == (size, size):
        return images
    resized = F.interpolate(images.float(), size=[size, size], mode="bicubic", align_corners=False)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=2)  # a batch may touch two epochs
def _permutation(seed: int, count: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
