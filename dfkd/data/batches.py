"""What training is fed: which images each step takes, in which views, and the form in which networks take them.

The images of a run are one stream, epoch after epoch, every epoch a permutation of the training positions; a batch is
the next ``batch_size`` of the stream, across the end of an epoch if need be, so that every batch (but a run's last)
has one size and each image is seen exactly once per epoch. Order and views are pure functions of seed, epoch and step:
any step can be the first, and a resumed run needs no generator's state.

Every source of batches (dfkd.data.loader) gives the same images, labels, ids and views in the same order.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from dfkd.config import RESIZES
from dfkd.data.views import Views, apply_views, coin, draw
from dfkd.resizing import resized
from dfkd.runtime import generator

READ_ROWS = 1024  # images that read_all holds in their own size at a time


class Images(Protocol):
    """Labelled images at positions 0 to N - 1: Pool, ShardPool, ImageFiles, JoinedImages."""

    @property
    def labels(self) -> Tensor: ...

    @property
    def ids(self) -> Tensor: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def digest(self) -> str: ...

    def read(self, positions: Tensor) -> Tensor:
        """uint8 [n, 3, H, W] at int64 [n] positions; raises UsageError naming file and id of one that is damaged."""


@runtime_checkable
class Encoded(Protocol):
    """Images in files whose bytes another decoder may take: ShardPool, ImageFiles, JoinedImages.

    image_size: side in pixels of what read() gives. files: "sized" where every file has that size; "fitted" where
    files of any size are cut to a square and resized (dfkd.data.codec); "" where read() alone can decode them.
    """

    image_size: int
    files: str

    def encoded(self, positions: Tensor) -> list[NDArray[np.uint8]]:
        """The bytes of the files; raises UsageError naming file and id of one that cannot be read whole."""


@dataclass(frozen=True)
class Order:
    """Which positions of ``range(count)`` each step of a run takes; ``length`` images in all.

    A step's global batch has batch_size images (the last step fewer, where the length asks for it) whatever the number
    of ranks; rank ``rank`` of ``world`` takes one contiguous part of it, and the parts differ by one image at most.
    """

    seed: int
    count: int
    batch_size: int
    length: int
    rank: int = 0
    world: int = 1

    @property
    def steps(self) -> int:
        return -(-self.length // self.batch_size)

    def size(self, step: int) -> int:
        """Images of the global batch."""
        return min(self.batch_size, self.length - step * self.batch_size)

    def rows(self, step: int) -> slice:
        """The rows of the global batch that this rank takes; none where it has fewer rows than there are ranks."""
        size = self.size(step)
        return slice(size * self.rank // self.world, size * (self.rank + 1) // self.world)

    def global_batch(self, step: int) -> Tensor:
        """Positions int64 [size(step)] of all ranks."""
        start = step * self.batch_size
        stop = start + self.size(step)
        parts = []
        while start < stop:
            epoch, first = divmod(start, self.count)
            parts.append(_permutation(self.seed, self.count, epoch)[first : first + stop - start])
            start += len(parts[-1])
        return torch.cat(parts)

    def mirrored(self, step: int) -> Tensor:
        """bool [size(step)]: which images of the global batch an alternating flip mirrors.

        A coin for each image decides about its first epoch, and from then on every other epoch has it mirrored: in two
        epochs both views are seen, which random flips miss for half of the images (Jordan, arXiv:2404.00498).
        """
        start = step * self.batch_size
        epoch = torch.arange(start, start + self.size(step)) // self.count
        return _coins(self.seed, self.count)[self.global_batch(step)] ^ (epoch % 2).bool()

    def batch(self, step: int) -> Tensor:
        """Positions int64 of this rank: its rows of the global batch."""
        return self.global_batch(step)[self.rows(step)]


@dataclass(frozen=True)
class Step:
    """What one batch is made of: positions int64 [B] and the views of the images there.

    random: the generator that the views were drawn from, for what else is drawn for this batch; None where it is not
    the batch's own.
    """

    positions: Tensor
    views: Views
    random: Generator | None = None


def steps(order: Order, kind: str, size: int, start: int) -> Iterator[Step]:
    """The steps of a run from ``start`` to its last, for this rank; views (``kind``) of images of size x size.

    Views are drawn for the whole global batch, so that an image's does not depend on the number of ranks.
    """
    for step in range(start, order.steps):
        random = generator(order.seed, "view", step)
        views = draw(kind, order.size(step), size, size, random)
        if kind == "crop-altflip":
            views = views.mirror(order.mirrored(step))
        yield Step(order.batch(step), views.rows(order.rows(step)), random)


@dataclass(frozen=True)
class Form:
    """The form in which a network takes images: side in pixels, mean and deviation per channel (of images in 0..1).

    dtype: values are computed in float32 and rounded to it once, as autocast rounds what goes into the first layer.
    resize: how images of another side are brought to it (dfkd.resizing).
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    dtype: torch.dtype = torch.float32
    resize: str = RESIZES[0]

    def finish(self, pixels: Tensor, views: Views) -> Tensor:
        """uint8 [B, size, size, 3] on the device -> dtype [B, 3, size, size], channels_last: viewed and normalised."""
        images = apply_views(pixels.permute(0, 3, 1, 2).float().div_(255), views)
        mean = images.new_tensor(self.mean).view(1, 3, 1, 1)
        std = images.new_tensor(self.std).view(1, 3, 1, 1)
        return images.sub_(mean).div_(std).to(self.dtype).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Batch:
    """images: in the networks' Form, on its device; labels int64 [B] there; ids int64 [B] in main memory.

    random: of the Step.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    random: Generator | None = None


class Source(Protocol):
    """Gives batches. Made once, before long work; what cannot work is refused there with a UsageError."""

    def batches(self, steps: Iterable[Step]) -> Iterator[Batch]:
        """One batch for every step, in order; steps may be asked for ahead.

        May be called again once the former iterator has ended or was closed. Raises UsageError naming file and id of
        an image that is damaged.
        """


def read_all(data: Images, positions: Tensor, size: int, how: str = RESIZES[0]) -> Tensor:
    """uint8 [n, 3, size, size] at int64 [n] positions, before any view. how: as `resize`."""
    return torch.cat([resize(data.read(part), size, how) for part in torch.split(positions, READ_ROWS)])


def read_pixels(data: Images, positions: Tensor, size: int, how: str = RESIZES[0]) -> Tensor:
    """uint8 [n, size, size, 3], contiguous: channels last in memory, which is what convolutions want of a batch."""
    return read_all(data, positions, size, how).permute(0, 2, 3, 1).contiguous()


def resize(images: Tensor, size: int, how: str = RESIZES[0]) -> Tensor:
    """uint8 [B, 3, H, W] -> uint8 [B, 3, size, size], as guidance showed them to a teacher that resizes so.

    Done once, when images are read, and so that augmentation works in the pixels of the networks.
    how: "antialias" or "published", of dfkd.resizing.
    """
    if images.shape[-2:] == (size, size):
        return images
    return resized(images.float(), size, how).round_().clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=2)  # a batch may touch two epochs
def _permutation(seed: int, count: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "order", epoch))


@lru_cache(maxsize=1)
def _coins(seed: int, count: int) -> Tensor:
    return coin(count, generator(seed, "flip", 0))
