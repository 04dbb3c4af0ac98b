"""Consistency of activation regions: the student should look where the teacher looks.

mSARC, the multi-scale spatial activation region consistency of SpaceshipNet (Yu et al., CVPR 2023). With the last
feature map F [B, D, h, w], the final linear layer's weights W [C, D], feature maps A_l [B, K, h, w] of three stages and
the teacher's first choice c,

    CAM      M   = W F                                     every class, W as a 1x1 convolution (Zhou et al., CVPR 2016)
    Grad-CAM G_l = sum_k mean_hw(d logit_c / d A_lk) A_lk  (Selvaraju et al., arXiv:1610.02391, without its ReLU)
    loss         = mean (M_s - M_t)^2 + sum_l mean (G_l,s - G_l,t)^2

Maps are compared as they are: the authors' code has no ReLU and no normalisation either. Two points differ from it. It
holds the gradient in G_l and the weights in M constant; here both belong to the student's graph, so that descent
follows the loss that is written above. And its pairs have maps of one size; here the larger map is brought to the
smaller one's size, which keeps what a map means: the average of a CAM is the logit (less the bias), so CAMs are
averaged, and the sum of a Grad-CAM is what the stage adds to the logit, so Grad-CAMs are summed.

Their KL divergence is a mean over batch and classes and stands beside this loss with weight 1. Beside a mean over the
batch, as it is here, that is a weight of C.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# float16 loses a gradient below 6e-8, and a logit's in an early map of many cells is not far from there.
FP16_SCALE = 2.0**10


@dataclass(frozen=True)
class Maps:
    """What a network looked at: cam [B, C, h, w] or None, grad_cams each [B, h, w]; float32 (float64 stays)."""

    cam: Tensor | None
    grad_cams: tuple[Tensor, ...]


def class_activation_maps(features: Tensor, weight: Tensor) -> Tensor:
    """M [B, C, h, w] of a last feature map [B, D, h, w] and the final weights [C, D], differentiable in both."""
    features = _wide(features)
    return F.conv2d(features, weight.to(features.dtype)[:, :, None, None])


def grad_cams(logits: Tensor, classes: Tensor, features: Sequence[Tensor], create_graph: bool) -> tuple[Tensor, ...]:
    """G_l [B, h, w] for the logits [B, C] at classes int64 [B], of every feature map [B, K, h, w] that they come from.

    create_graph: the maps can be differentiated, to the second order in the network (a student's); without it they are
    constants and the graph of the logits is used up (a teacher's).
    The gradient is that of the sum over the batch: a BatchNorm layer in training mode lets rows reach each other.
    """
    scale = FP16_SCALE if torch.float16 in {value.dtype for value in (logits, *features)} else 1.0
    chosen = logits.gather(1, classes[:, None]).sum() * scale
    gradients = torch.autograd.grad(chosen, tuple(features), retain_graph=create_graph, create_graph=create_graph)
    maps = []
    for gradient, feature in zip(gradients, features, strict=True):
        weight = _wide(gradient).mean((2, 3), keepdim=True) / scale
        found = (weight * _wide(feature)).sum(1)
        maps.append(found if create_graph else found.detach())
    return tuple(maps)


def msarc_loss(student: Maps, teacher: Maps) -> Tensor:
    """The loss above, a scalar: of the maps that both have, as many of each as the other."""
    parts = []
    if student.cam is not None and teacher.cam is not None:
        parts.append(_distance(*_averaged_to_one_size(student.cam, teacher.cam)))
    for mine, theirs in zip(student.grad_cams, teacher.grad_cams, strict=True):
        parts.append(_distance(*_summed_to_one_size(mine, theirs)))
    return torch.stack(parts).sum()


def _distance(mine: Tensor, theirs: Tensor) -> Tensor:
    return (mine - theirs).square().mean()


def _averaged_to_one_size(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Both [..., h, w], h and w the smaller ones: cells of the larger map are averaged."""
    size = min(mine.shape[-2], theirs.shape[-2]), min(mine.shape[-1], theirs.shape[-1])
    one, other = (value if value.shape[-2:] == size else F.adaptive_avg_pool2d(value, size) for value in (mine, theirs))
    return one, other


def _summed_to_one_size(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    one, other = _averaged_to_one_size(mine, theirs)
    area = one.shape[-2] * one.shape[-1]
    return one * (mine.shape[-2] * mine.shape[-1] / area), other * (theirs.shape[-2] * theirs.shape[-1] / area)


def _wide(value: Tensor) -> Tensor:
    return value if value.element_size() >= 4 else value.float()
