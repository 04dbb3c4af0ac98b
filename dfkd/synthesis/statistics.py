"""BatchNorm statistics of a teacher's feature maps, per image and over a group.

The tap reads what enters every BatchNorm layer. It keeps the first two moments about the layer's running mean r,

    m1 = mean_hw(x - r)        m2 = mean_hw((x - r)^2)        so   mean - r = M1,  var = M2 - M1^2 (biased)

with M1, M2 either an image's own moments or their average over a group of images. Averages of moments add up, so a
group's statistics are exact however the group is cut into micro-batches; taking them about r keeps M2 - M1^2 free of
cancellation where the feature map follows the teacher's training data.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Moments:
    """Moments of one layer: m1, m2 [B, C] of every image or [1, C] of a group, about the layer's running mean."""

    m1: Tensor
    m2: Tensor


def moments_of(x: Tensor, layer: nn.BatchNorm2d) -> Moments:
    """Moments [B, C] of what enters a layer, x [B, C, H, W]; float32 at least."""
    assert layer.running_mean is not None
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x - layer.running_mean.to(x)[None, :, None, None]
    return Moments(x.mean((2, 3)), x.square().mean((2, 3)))


def once_each(calls: Sequence[Sequence[T]]) -> list[T]:
    """What every layer's one call gave. Raises ValueError for a layer that was not used exactly once in a pass."""
    for index, found in enumerate(calls):
        if len(found) != 1:
            raise ValueError(f"BatchNorm layer {index} was used {len(found)} times in a pass; L_bn needs exactly one")
    return [found[0] for found in calls]


@contextmanager
def tapped(layers: tuple[nn.BatchNorm2d, ...]) -> Iterator[list[Moments]]:
    """Watch one forward pass: the list is filled when the block ends, a Moments per layer in the order of `layers`.

    That is not the order in which a network calls them: many ResNets define the projection before the branch.
    Raises ValueError for a layer that was not used exactly once.
    """
    calls: list[list[Moments]] = [[] for _ in layers]
    taken: list[Moments] = []

    def read(into: list[Moments], layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        into.append(moments_of(inputs[0], layer))

    handles = [layer.register_forward_pre_hook(partial(read, into)) for layer, into in zip(layers, calls, strict=True)]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()
    taken += once_each(calls)


def bn_loss(moments: list[Moments], layers: tuple[nn.BatchNorm2d, ...], kind: str) -> Tensor:
    """How far moments [B or 1, C] lie from the running statistics: a loss of shape [B] or [1].

    norm      sum over layers of ||var - rvar||_2 + ||mean - rmean||_2, norms over channels (DiffDFKD, arXiv 2504.00870)
    relative  mean over layers and channels of ((mean - rmean)/rstd)^2 + (std/rstd - 1)^2, free of a layer's scale
    """
    total = moments[0].m1.new_zeros(moments[0].m1.shape[0])
    for taken, layer in zip(moments, layers, strict=True):
        assert layer.running_var is not None
        variance = (taken.m2 - taken.m1.square()).clamp_min(0)
        reference = layer.running_var.to(taken.m1)
        if kind == "norm":
            # the root's gradient is infinite at 0; 1e-12 is far below any statistic in float32
            spread = (variance - reference).square().sum(1).add(1e-12).sqrt()
            total = total + spread + taken.m1.square().sum(1).add(1e-12).sqrt()
        else:
            scale = (reference + layer.eps).rsqrt()
            ratio = (variance + layer.eps).sqrt() * scale
            total = total + ((taken.m1 * scale).square() + (ratio - 1).square()).mean(1) / len(layers)
    return total


def averaged(moments: list[Moments]) -> list[Moments]:
    """Moments of every image [G, C] -> the group's [1, C]."""
    return [Moments(m.m1.mean(0, keepdim=True), m.m2.mean(0, keepdim=True)) for m in moments]


def joined(parts: Sequence[list[Moments]]) -> list[Moments]:
    """Moments of several micro-batches, each a Moments per layer -> those of all their images."""
    return [Moments(torch.cat([m.m1 for m in of]), torch.cat([m.m2 for m in of])) for of in zip(*parts, strict=True)]


def group_moments(sums: list[Moments], count: int) -> list[Moments]:
    """Sums of moments over a group's `count` images [1, C] -> the group's moments [1, C]."""
    return [Moments(s.m1 / count, s.m2 / count) for s in sums]


def add_moments(sums: list[Moments], part: list[Moments], rows: int) -> list[Moments]:
    """Add the first `rows` images of a micro-batch to the group's sums ([] to begin); summed in float64."""
    fresh = [Moments(p.m1[:rows].double().sum(0, True), p.m2[:rows].double().sum(0, True)) for p in part]
    if not sums:
        return fresh
    return [Moments(s.m1 + f.m1, s.m2 + f.m2) for s, f in zip(sums, fresh, strict=True)]


@dataclass(frozen=True)
class GroupLoss:
    """A group's BN loss and its slope in every layer's moments, all that phase two needs to know of the group.

    value   the loss, a scalar on the device
    slopes  dL/dM1, dL/dM2 [1, C] per layer
    """

    value: Tensor
    slopes: list[Moments]

    @staticmethod
    def of(moments: list[Moments], layers: tuple[nn.BatchNorm2d, ...], kind: str) -> "GroupLoss":
        """From the moments of all the group's images, [G, C] per layer."""
        averages = averaged(moments)
        leaves = [Moments(m.m1.detach().requires_grad_(), m.m2.detach().requires_grad_()) for m in averages]
        with torch.enable_grad():
            loss = bn_loss(leaves, layers, kind).sum()
            flat = torch.autograd.grad(loss, [t for leaf in leaves for t in (leaf.m1, leaf.m2)])
        return GroupLoss(loss.detach(), [Moments(a, b) for a, b in zip(flat[::2], flat[1::2], strict=True)])

    def surrogate(self, moments: list[Moments]) -> Tensor:
        """A per-image quantity [B] whose gradient is that of (group size x group loss) in the image.

        The group's moments are averages, so dL/dx_i = 1/G sum_l <dL/dM, dm_i/dx_i>; times G, an image's guidance does
        not fade with the size of its group.
        """
        total = moments[0].m1.new_zeros(moments[0].m1.shape[0])
        for taken, slope in zip(moments, self.slopes, strict=True):
            total = total + (taken.m1 * slope.m1.to(taken.m1)).sum(1) + (taken.m2 * slope.m2.to(taken.m2)).sum(1)
        return total
