"""Which images each step of a run takes, and in which views.

The images of a run are one stream, epoch after epoch, every epoch a permutation of the training positions; a batch is
the next ``batch_size`` of the stream, across the end of an epoch if need be, so that every batch (but a run's last)
has one size and each image is seen exactly once per epoch. Order and views are pure functions of seed, epoch and step:
any step can be the first, and a resumed run needs no generator's state.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Generator, Tensor

from dfkd.data.loader.views import Views, draw
from dfkd.runtime import generator


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

    def batch(self, step: int) -> Tensor:
        """Positions int64 of this rank: those of its rows."""
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

    The views are drawn for the whole global batch, so that an image's does not depend on the number of ranks.
    """
    for step in range(start, order.steps):
        random = generator(order.seed, "view", step)
        views = draw(kind, order.size(step), size, size, random)
        yield Step(order.batch(step), views.rows(order.rows(step)), random)


@lru_cache(maxsize=2)  # a batch may touch two epochs
def _permutation(seed: int, count: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "order", epoch))
