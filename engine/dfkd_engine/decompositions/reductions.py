"""Sums and means of half precision tensors are taken in float32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


def sum_dims(x: Tensor, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    if x.dtype not in _HALF or dtype == torch.float32:
        return NotImplemented
    return aten.sum.dim_IntList(x, dim, keepdim, dtype=torch.float32).to(dtype or x.dtype)


def mean_dims(x: Tensor, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    if x.dtype not in _HALF or dtype == torch.float32:
        return NotImplemented
    return aten.mean.dim(x, dim, keepdim, dtype=torch.float32).to(dtype or x.dtype)


def mean(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return x.mean(tuple(range(x.dim())), dtype=dtype)


def vector_norm(
    x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    if ord != 2:
        return NotImplemented
    axes = tuple(range(x.dim())) if dim is None else dim
    return x.float().square().sum(axes, keepdim).sqrt().to(dtype or x.dtype)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.sum.dim_IntList: sum_dims,
    aten.mean.dim: mean_dims,
    aten.mean.default: mean,
    aten.linalg_vector_norm.default: vector_norm,
}
