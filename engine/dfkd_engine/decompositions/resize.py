"""Resizing of images as two products with constant matrices, and nearest enlargement by whole factors.

Every mode of F.interpolate on images is linear and works along one axis at a time, so it is a matrix for the height
and one for the width. They are read off PyTorch itself: interpolating the unit matrix along one axis.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dispatch.python import no_python_dispatcher
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten


def interpolate(
    x: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """F.interpolate of images [B, C, H, W]."""
    here = (int(x.shape[2]), int(x.shape[3]))
    sizes, factors = _pair(size), _pair(scale_factor)
    options = {
        "mode": mode,
        "align_corners": align_corners,
        "recompute_scale_factor": recompute_scale_factor,
        "antialias": antialias,
    }
    matrices = [
        _interpolation(here[axis], None if sizes is None else int(sizes[axis]), factors and factors[axis], **options)
        for axis in (0, 1)
    ]
    rows, columns = (len(matrix) for matrix in matrices)
    whole = rows % here[0] == 0 and columns % here[1] == 0
    if whole and mode in ("nearest", "nearest-exact"):
        enlarged: Tensor = Enlarge.apply(x, (rows, columns))  # type: ignore[no-untyped-call]
        return enlarged
    return along_axes(x, *(matrix.to(x.device, x.dtype) for matrix in matrices))


class Enlarge(torch.autograd.Function):
    """Nearest enlargement by whole factors: each pixel becomes a block, and its gradient is the block's sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.block = [size[0] // x.shape[2], size[1] // x.shape[3]]
        # the Python dispatcher would take it apart into an index on the level of autograd
        with torch._C._AutoDispatchBelowAutograd():
            out: Tensor = aten.upsample_nearest2d.default(x, list(size))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return F.avg_pool2d(grad, ctx.block) * (ctx.block[0] * ctx.block[1]), None


def along_axes(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows [h, H] and columns [w, W] applied to x [B, C, H, W] -> [B, C, h, w]."""
    wide = F.linear(x, columns)
    return F.linear(wide.transpose(2, 3), rows).transpose(2, 3)


def pooling_matrix(here: int, there: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[there, here]: adaptive average pooling along one axis."""
    return _read_off(lambda unit: F.adaptive_avg_pool2d(unit, (here, there)), here).to(device, dtype)


@cache
def _interpolation(here: int, size: int | None, factor: float | None, **options: Any) -> Tensor:
    sizes, factors = (None if size is None else (here, size)), (None if factor is None else (1.0, factor))
    return _read_off(lambda unit: F.interpolate(unit, sizes, factors, **options), here)


def _read_off(along_width: Callable[[Tensor], Tensor], here: int) -> Tensor:
    """The matrix [there, here] in float32 of a linear map along the last axis; computed in float64."""
    with torch.no_grad(), _disable_current_modes(), no_python_dispatcher():
        unit = torch.eye(here, dtype=torch.float64)[None, None]
        return along_width(unit)[0, 0].t().float().contiguous()


def _pair(value: Any) -> Sequence[Any] | None:
    if value is None:
        return None
    return list(value) if isinstance(value, Sequence) else [value, value]
