"""Softmax and its loss, sums and means in float32 whatever the dtype, and gradients of activations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_NONE, _MEAN = 0, 1  # at::Reduction


def softmax(x: Tensor, dim: int, half_to_float: bool) -> Any:
    if x.dtype not in _HALF:
        return NotImplemented
    out = aten._softmax.default(x.float(), dim, False)
    return out if half_to_float else out.to(x.dtype)


def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Any:
    if x.dtype not in _HALF:
        return NotImplemented
    out = aten._log_softmax.default(x.float(), dim, False)
    return out if half_to_float else out.to(x.dtype)


def softmax_backward(grad: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    g, p = grad.float(), y.float()
    return (p * (g - (g * p).sum(dim, keepdim=True))).to(dtype)


def log_softmax_backward(grad: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    g = grad.float()
    return (g - y.float().exp() * g.sum(dim, keepdim=True)).to(dtype)


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return grad * (s * (1 + x * (1 - s)))


def threshold_backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    return keep(x > threshold, grad)


def keep(mask: Tensor, x: Tensor) -> Tensor:
    """x where the mask is set, else 0, even where x is infinite."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def nll_loss_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """x [B, C] log probabilities, target [B] classes. Returns the loss and the sum of the targets' weights."""
    weights = _weights(x, target, weight, ignore_index)
    losses = -(x.float() * weights).sum(1)
    total = weights.sum()
    if reduction == _NONE:
        return losses.to(x.dtype), total.to(x.dtype)
    summed = losses.sum()
    return (summed / total if reduction == _MEAN else summed).to(x.dtype), total.to(x.dtype)


def nll_loss_backward(
    grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, total: Tensor
) -> Tensor:
    g = grad.float() / total.float() if reduction == _MEAN else grad.float()
    g = g[:, None] if reduction == _NONE else g
    return (-g * _weights(x, target, weight, ignore_index)).to(x.dtype)


def _weights(x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """[B, C] in float32: the class's weight at the target, 0 elsewhere and where the target is ignored."""
    classes = torch.arange(x.shape[1], device=x.device)
    hit = (target[:, None] == classes) & (classes != ignore_index)
    return hit.float() if weight is None else hit * weight.float()


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
    aten._softmax.default: softmax,
    aten._log_softmax.default: log_softmax,
    aten._softmax_backward_data.default: softmax_backward,
    aten._log_softmax_backward_data.default: log_softmax_backward,
    aten.silu_backward.default: silu_backward,
    aten.threshold_backward.default: threshold_backward,
    aten.nll_loss_forward.default: nll_loss_forward,
    aten.nll_loss_backward.default: nll_loss_backward,
    aten.sum.dim_IntList: sum_dims,
    aten.mean.dim: mean_dims,
    aten.mean.default: mean,
    aten.linalg_vector_norm.default: vector_norm,
}
