"""Losses between a frozen teacher's logits and a student's; computed in float32 at least."""

import torch.nn.functional as F
from torch import Tensor


def kl_at_temperature(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(s / T)), mean over the batch (Hinton et al., arXiv:1503.02531).

    student, teacher: logits [B, C], any float dtype; returns a scalar in float32 (float64 stays). T^2 keeps the
    gradient's size as T grows.
    """
    s, t = (_at_least_float32(logits) / temperature for logits in (student, teacher))
    divergence = F.kl_div(F.log_softmax(s, 1), F.log_softmax(t, 1), reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, C] with labels int64 [B]; a scalar in float32 (float64 stays)."""
    return F.cross_entropy(_at_least_float32(student), labels)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.element_size() >= 4 else logits.float()
