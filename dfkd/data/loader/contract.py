"""What every source of batches takes and gives."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

from dfkd.data.loader.order import Step
from dfkd.data.loader.views import Views, apply


class Images(Protocol):
    """Labelled images at positions 0 to N - 1; dfkd.data.shards' Pool and ShardPool are such."""

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
    """Images that lie in files, whose bytes something else may decode; dfkd.data.shards' ShardPool is such.

    image_format: png, jpg or npy, or "" where files differ; image_size: the side in pixels that all of them have.
    """

    image_format: str
    image_size: int

    def encoded(self, positions: Tensor) -> list[npt.NDArray[np.uint8]]:
        """The bytes of the files; raises UsageError naming file and id of one that cannot be read whole."""


@dataclass(frozen=True)
class Form:
    """The form in which a network takes images: side in pixels, mean and deviation per channel (of images in 0..1).

    dtype: values are computed in float32 and rounded to it once, as autocast rounds what goes into the first layer.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    dtype: torch.dtype = torch.float32

    def finish(self, pixels: Tensor, views: Views) -> Tensor:
        """uint8 [B, size, size, 3] on the device -> dtype [B, 3, size, size], channels_last: viewed and normalised."""
        images = apply(pixels.permute(0, 3, 1, 2).float().div_(255), views)
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
    """Made once, before long work; what cannot work is refused there with a UsageError."""

    def batches(self, steps: Iterable[Step]) -> Iterator[Batch]:
        """One batch for every step, in order; steps may be asked for ahead.

        May be called again once the former iterator has ended or was closed. Raises UsageError naming file and id of
        an image that is damaged.
        """
