"""The negative log likelihood of classes as a sum over a one-hot mask: no gather, and no scatter in its gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_NONE, _MEAN = 0, 1  # at::Reduction


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


TABLE: dict[Any, Callable[..., Any]] = {
    aten.nll_loss_forward.default: nll_loss_forward,
    aten.nll_loss_backward.default: nll_loss_backward,
}
