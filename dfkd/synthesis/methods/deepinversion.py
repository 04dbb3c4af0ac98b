"""DeepInversion (arXiv 1912.08795): pixels optimised from noise until the teacher sees its own training data in them.

    x  <-  Adam on   cls CE(T(view(x)), y) + bn L_bn(statistics of the group) + tv TV(view(x)) + l2 ||x||_2
                     - adv JS(T(view(x)), S(view(x))),                                                       x in 0..1

with L_bn relative to each layer's scale and a view that is a random shift, and a flip where asked for, new at each
step and the same for the whole group. The last term is Adaptive DeepInversion's competition with a student S. No prior
enters; guided diffusion is measured against it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dfkd.config import GenerateConfig, option
from dfkd.runtime import generator
from dfkd.synthesis.losses import BatchNormLoss, CrossEntropy, GuidanceLoss, Seen, TotalVariation
from dfkd.synthesis.methods.groups import GroupMethod, GroupSettings, LossCurve, Made, settings_for
from dfkd.teachers import Classifier
from dfkd_engine.priors.prior import Prior
from dfkd_kernels.philox import philox_uniform

START = 0  # Philox stream
SOFT, LEAST = 3.0, 0.01  # temperature of the competition, and its probabilities' distance from 0 and 1, as published


@dataclass(frozen=True, kw_only=True)
class Settings(GroupSettings):
    """What stands in the parentheses of `deepinversion(steps=200)`. Raises ValueError for values out of range.

    The sources take 1000 to 2000 steps at lr=0.1 for 32x32.
    """

    steps: int = option(500, "of Adam", low=0)
    lr: float = option(0.2, "its learning rate", low=0)
    schedule: str = option("constant", "of the learning rate; cosine: falling to 0", choices=("constant", "cosine"))
    bn_weight: float = option(10.0, "weight of the BatchNorm-statistics loss", low=0)
    tv_weight: float = option(0.05, "weight of the total variation", low=0)
    l2_weight: float = option(0.0, "weight of the 2-norm of an image's pixels", low=0)
    shift: int = option(2, "most pixels of the random shift", low=0, unit="pixels")
    flip: bool = option(False, "mirror every second view or so; not where left and right differ, as in digits")


@dataclass(frozen=True)
class PixelNorm(GuidanceLoss):
    """2-norm of an image's pixels."""

    name = "l2"

    def __call__(self, seen: Seen) -> Tensor:
        return seen.images.square().sum((1, 2, 3)).add(1e-12).sqrt()  # the root's slope is infinite at 0


@dataclass(frozen=True)
class Competition(GuidanceLoss):
    """Minus half of KL(m || softmax T/3) + KL(m || softmax S/3), m their mean: low where the student differs.

    The divergences of Adaptive DeepInversion's code, whose arguments are the other way round in the paper; as there,
    the gradient passes teacher and student, and probabilities are held in 0.01..0.99.
    """

    name = "adv"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"student"})

    def __call__(self, seen: Seen) -> Tensor:
        assert seen.student_logits is not None
        teacher, student = ((logits / SOFT).softmax(1) for logits in (seen.logits, seen.student_logits))
        mean, teacher, student = (p.clamp(LEAST, 1 - LEAST) for p in ((teacher + student) / 2, teacher, student))
        return -0.5 * (mean * (2 * mean.log() - teacher.log() - student.log())).sum(1)


class DeepInversion(GroupMethod):
    """Synthesizer of groups of images, each group from its own noise by `Settings`."""

    name = "deepinversion"

    def __init__(
        self,
        prior: Prior | None,
        teacher: Classifier,
        config: GenerateConfig,
        student: Classifier | None = None,
        **settings: Any,
    ) -> None:
        self.settings = settings_for(Settings, config, settings)
        super().__init__(teacher, config, self.settings, student)

    def losses(self) -> tuple[GuidanceLoss, ...]:
        own = self.settings
        statistics = BatchNormLoss(own.bn_weight, "group", "relative")
        pixels = TotalVariation(own.tv_weight), PixelNorm(own.l2_weight)
        return CrossEntropy(own.cls_weight), statistics, *pixels, Competition(own.adv_weight)

    def steps_of(self, groups: int) -> int:
        return groups * self.settings.steps

    def make(self, ids: Tensor, labels: Tensor, seed: int, stepped: Callable[[], None]) -> Made:
        own, shape = self.settings, (3, self.image_size, self.image_size)
        views = generator(seed, self.name, int(ids[0]) // self.group)
        x = philox_uniform(seed, ids.to(self.device), START, shape).requires_grad_()
        targets, losses, curve = labels.to(self.device), dict[str, Tensor](), LossCurve(own.steps)
        adam = torch.optim.Adam([x], lr=own.lr)
        for step in range(own.steps):
            if own.schedule == "cosine":
                adam.param_groups[0]["lr"] = own.lr * (1 + math.cos(math.pi * step / own.steps)) / 2
            shift = torch.randint(-own.shift, own.shift + 1, (2,), generator=views).tolist()
            flip = bool(torch.rand((), generator=views) < 0.5) and own.flip
            view = partial(_view, shift, flip)
            x.grad, losses = self.guidance.gradient(x.detach(), targets, self.call_size, view)
            curve.see(step, losses)
            adam.step()
            x.data.clamp_(0, 1)
            stepped()
        return Made(x.detach(), labels, losses, curve.stacked())


def _view(shift: Sequence[int], flip: bool, z: Tensor, images: Tensor) -> Tensor:
    """Images z [B, 3, H, W] moved down and right, what leaves an edge coming in at the other, and mirrored."""
    z = z.roll(tuple(shift), (2, 3))
    return z.flip(3) if flip else z
