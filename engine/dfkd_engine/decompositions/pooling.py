"""Pooling, its gradients put together from the slices that the windows see: no indices and no scatter.

Window element (i, j) of all windows is a strided slice of the padded input. Its gradients, one per window, return to
the same places: elements of equal remainder by the stride lie on one coarse grid, where they are shifted and added;
the coarse grids are then interleaved. Kernels, strides, padding and dilation are (height, width).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_engine.decompositions.activations import keep
from dfkd_engine.decompositions.resize import along_axes, pooling_matrix

aten = torch.ops.aten
Pair: TypeAlias = tuple[int, int]
Ints: TypeAlias = Sequence[int]


@dataclass(frozen=True)
class Windows:
    """Where the windows of a pooling over maps of `size` lie; `count` windows along each axis."""

    size: Pair
    count: Pair
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    def places(self) -> list[Pair]:
        """The elements of a window, row by row."""
        return [(i, j) for i in range(self.kernel[0]) for j in range(self.kernel[1])]

    def cells(self, axis: int) -> int:
        """Size of the coarse grid that holds every window element."""
        reach = (self.kernel[axis] - 1) * self.dilation[axis]
        return max(self.count[axis] + reach // self.stride[axis], -(-self._end(axis) // self.stride[axis]))

    def padded(self, x: Tensor, value: float) -> Tensor:
        """x [B, C, *size] with the padding of the pooling, and more behind it where the last window needs it."""
        ends = [max(self._last(axis) - self.padding[axis] - self.size[axis], 0) for axis in (0, 1)]
        pad = [self.padding[1], ends[1], self.padding[0], ends[0]]
        return F.pad(x, pad, value=value) if any(pad) else x

    def slice(self, padded: Tensor, place: Pair) -> Tensor:
        """What element `place` of every window sees [B, C, *count]."""
        at = [place[axis] * self.dilation[axis] for axis in (0, 1)]
        end = [at[axis] + (self.count[axis] - 1) * self.stride[axis] + 1 for axis in (0, 1)]
        return padded[:, :, at[0] : end[0] : self.stride[0], at[1] : end[1] : self.stride[1]]

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        """Sum of parts [B, C, *count], one for each of places(), each where its elements come from: [B, C, *size]."""
        rows, columns = self.cells(0), self.cells(1)
        grids: dict[Pair, Tensor] = {}
        for (i, j), part in zip(self.places(), parts, strict=True):
            down, row = divmod(i * self.dilation[0], self.stride[0])
            right, column = divmod(j * self.dilation[1], self.stride[1])
            pad = [right, columns - self.count[1] - right, down, rows - self.count[0] - down]
            shifted = F.pad(part, pad) if any(pad) else part
            known = grids.get((row, column))
            grids[row, column] = shifted if known is None else known + shifted
        empty = torch.zeros_like(next(iter(grids.values())))
        lines = [
            torch.stack([grids.get((row, column), empty) for column in range(self.stride[1])], -1).flatten(-2)
            for row in range(self.stride[0])
        ]
        whole = torch.stack(lines, -2).flatten(2, 3) if len(lines) > 1 else lines[0]
        top, left = self.padding
        return whole[:, :, top : top + self.size[0], left : left + self.size[1]]

    def _last(self, axis: int) -> int:
        """Elements of the padded input along an axis up to the last that any window sees: its position plus one."""
        return (self.count[axis] - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis] + 1

    def _end(self, axis: int) -> int:
        return self.padding[axis] + self.size[axis]


def max_pool2d_backward(
    grad: Tensor, x: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool, indices: Tensor
) -> Tensor:
    """The gradient goes to the first maximum of a window, as in PyTorch; indices are not used."""
    if x.dim() == 3:
        return max_pool2d_backward(grad[None], x[None], kernel, stride, padding, dilation, ceil_mode, indices)[0]
    windows = _windows(x, grad, kernel, stride, padding, dilation)
    # equal to the forward operation, and merged with it
    top, _ = aten.max_pool2d_with_indices.default(x, kernel, stride, padding, dilation, ceil_mode)
    padded = windows.padded(x, float("-inf"))
    parts, free = [], None
    for place in windows.places():
        hit = windows.slice(padded, place) == top
        first = hit if free is None else hit & free
        free = ~hit if free is None else free & ~hit
        parts.append(keep(first, grad))
    return windows.gather(parts)


def avg_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    if x.dim() == 3:
        options = (kernel, stride, padding, ceil_mode, count_include_pad, divisor)
        return avg_pool2d_backward(grad[None], x[None], *options)[0]
    windows = _windows(x, grad, kernel, stride, padding, [1])
    if divisor is None:
        counts = [_counts(windows, axis, count_include_pad) for axis in (0, 1)]
        share = torch.tensor([[1 / (rows * columns) for columns in counts[1]] for rows in counts[0]])
        part = grad * share.to(grad.device, grad.dtype)
    else:
        part = grad / divisor
    return windows.gather([part] * len(windows.places()))


def adaptive_avg_pool2d(x: Tensor, size: Ints) -> Tensor:
    return along_axes(x, *(pooling_matrix(x.shape[2 + i], size[i], x.device, x.dtype) for i in (0, 1)))


def adaptive_avg_pool2d_backward(grad: Tensor, x: Tensor) -> Tensor:
    shapes = zip(x.shape[-2:], grad.shape[-2:], strict=True)
    rows, columns = (pooling_matrix(here, there, x.device, x.dtype) for here, there in shapes)
    return along_axes(grad, rows.t().contiguous(), columns.t().contiguous())


def _counts(windows: Windows, axis: int, count_include_pad: bool) -> list[int]:
    """Elements that each window divides by along one axis; padding that ceil_mode adds never counts."""
    size, padding = windows.size[axis], windows.padding[axis]
    starts = [index * windows.stride[axis] - padding for index in range(windows.count[axis])]
    ends = [min(start + windows.kernel[axis], size + padding) for start in starts]
    if count_include_pad:
        return [end - start for start, end in zip(starts, ends, strict=True)]
    return [min(end, size) - max(start, 0) for start, end in zip(starts, ends, strict=True)]


def _windows(x: Tensor, grad: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Windows:
    sizes = (x.shape[-2], x.shape[-1]), (grad.shape[-2], grad.shape[-1])
    return Windows(*sizes, _pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation))


def _pair(values: Ints) -> Pair:
    return (values[0], values[-1])


def slice_backward(grad: Tensor, sizes: Ints, dim: int, start: int, end: int, step: int) -> Tensor:
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


def select_backward(grad: Tensor, sizes: Ints, dim: int, index: int) -> Tensor:
    dim = dim % len(sizes)
    index = index % sizes[dim]
    return _pad(grad.unsqueeze(dim), dim, index, sizes[dim] - index - 1)


def _pad(x: Tensor, dim: int, before: int, behind: int) -> Tensor:
    if before == 0 and behind == 0:
        return x
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [before, behind])


TABLE: dict[Any, Callable[..., Any]] = {
    aten.max_pool2d_with_indices_backward.default: max_pool2d_backward,
    aten.avg_pool2d_backward.default: avg_pool2d_backward,
    aten._adaptive_avg_pool2d.default: adaptive_avg_pool2d,
    aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool2d_backward,
    aten.slice_backward.default: slice_backward,
    aten.select_backward.default: select_backward,
}
