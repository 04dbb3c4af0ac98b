"""Cutting a group of rows into micro-batches of one fixed shape."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def cuts(total: int, micro: int, device: torch.device | None = None) -> Iterator[tuple[Tensor, int]]:
    """Row indices [min(micro, total)] of each micro-batch and how many of them count.

    Every micro-batch has one shape, so that a compiled network meets a single one; the last is filled up with its
    own last row, and what was filled up is dropped by whoever reads the count. Indices on the device of what they index
    keep the host from waiting for it.
    """
    size = min(micro, total)
    for start in range(0, total, size):
        rows = torch.arange(start, start + size, device=device).clamp_max(total - 1)
        yield rows, min(size, total - start)


def in_microbatches(
    function: Callable[[Tensor], Tensor], total: int, micro: int, device: torch.device | None = None
) -> Tensor:
    """Apply `function(row indices) -> rows` to all of `total` rows and join what counts."""
    return torch.cat([function(rows)[:count] for rows, count in cuts(total, micro, device)])
