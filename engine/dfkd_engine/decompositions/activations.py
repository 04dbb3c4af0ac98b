"""Activations: softmax in float32, and gradients of what PyTorch's own table takes apart less well."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


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


TABLE: dict[Any, Callable[..., Any]] = {
    aten._softmax.default: softmax,
    aten._log_softmax.default: log_softmax,
    aten._softmax_backward_data.default: softmax_backward,
    aten._log_softmax_backward_data.default: log_softmax_backward,
    aten.silu_backward.default: silu_backward,
    aten.threshold_backward.default: threshold_backward,
}
