"""Gradients of slices: zeros around the gradient, without a scatter."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def slice_backward(grad: Tensor, sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Tensor:
    """grad of x[..., start:end:step, ...] along dim, x of `sizes`."""
    dim = dim % len(sizes)
    size, taken = sizes[dim], grad.shape[dim]
    if taken == size:
        return grad
    start = start + size if start < 0 else min(start, size)
    if step > 1:  # every element at the head of `step` places
        grad = _pad(grad.unsqueeze(dim + 1), dim + 1, 0, step - 1).flatten(dim, dim + 1)
        behind = size - start - taken * step
        if behind < 0:
            grad, behind = grad.narrow(dim, 0, size - start), 0
        return _pad(grad, dim, start, behind)
    return _pad(grad, dim, start, size - start - taken)


def select_backward(grad: Tensor, sizes: Sequence[int], dim: int, index: int) -> Tensor:
    dim = dim % len(sizes)
    index = index % sizes[dim]
    return _pad(grad.unsqueeze(dim), dim, index, sizes[dim] - index - 1)


def _pad(x: Tensor, dim: int, before: int, behind: int) -> Tensor:
    if before == 0 and behind == 0:
        return x
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [before, behind])


TABLE: dict[Any, Callable[..., Any]] = {
    aten.slice_backward.default: slice_backward,
    aten.select_backward.default: select_backward,
}
