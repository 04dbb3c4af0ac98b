"""Losses between a frozen teacher's logits and a student's; computed in float32 at least."""

import torch.nn.functional as F
from torch import Tensor

from dfkd_kernels.soft_kl import divergence, soft_kl


def kl_at_temperature(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(s / T)), mean over the batch (Hinton et al., arXiv:1503.02531).

    student, teacher: logits [B, C], any float dtype; returns a scalar in float32 (float64 stays). T^2 keeps the
    gradient's size as T grows.
    """
    return temperature**2 * (divergence(student, teacher, temperature).sum() / len(student))


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, C] with labels int64 [B]; a scalar in float32 (float64 stays)."""
    return F.cross_entropy(student if student.element_size() >= 4 else student.float(), labels)


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float, labels: Tensor, ce_weight: float, kernels: str
) -> Tensor:
    """kl_at_temperature + ce_weight cross_entropy: as written, or by one launch that makes the gradient too.

    kernels: "torch" or "triton"; they differ by rounding.
    """
    if kernels == "triton":
        return soft_kl(student, teacher, temperature, labels, ce_weight).mean()
    loss = kl_at_temperature(student, teacher, temperature)
    return loss + ce_weight * cross_entropy(student, labels) if ce_weight else loss
