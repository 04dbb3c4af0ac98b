"""Fast data-free distillation (arXiv 2112.06253, AAAI 2022): a meta-learned generator, adapted to a group in few steps.

A group is an episode: a copy G' of the generator G and the group's latents z take a few steps of Adam down

    cls CE(T(view(x)), y) + bn L_bn(running statistics of the groups so far) + adv L_adv(S),        x = G'(z)

and what they have in common goes back into G: the sum of the steps' gradients (first-order MAML), or the difference
G - G' (Reptile), as the gradient of an Adam of its own. The group's images are those of the step of least loss.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dfkd.config import VIEWS, GenerateConfig, option
from dfkd.data import apply_views, draw
from dfkd.runtime import generator
from dfkd.synthesis.bn_statistics import Moments, averaged, bn_distance
from dfkd.synthesis.losses import Adversarial, CrossEntropy, GuidanceLoss, Seen
from dfkd.synthesis.methods.generator import Generator, draw_weights, give_tensors, tensors_of
from dfkd.synthesis.methods.groups import (
    GroupMethod,
    GroupSettings,
    LossCurve,
    Made,
    seen_whole,
    settings_for,
    total_of,
)
from dfkd.teachers import Classifier
from dfkd_engine.priors.prior import Prior
from dfkd_kernels.philox import philox_normal

START = 0  # Philox stream
BETAS = (0.5, 0.999)  # of Adam, as in DCGAN


@dataclass(frozen=True, kw_only=True)
class Settings(GroupSettings):
    """What stands in the parentheses of `fast(steps=5)`. Raises ValueError for values out of range.

    Published for CIFAR: groups of 256; steps, lr and lr_z of 2, 0.005, 0.015; of 5, 0.003, 0.01; of 10, 0.002, 0.01;
    cls_weight 0.5, or 0.4 for a Wide ResNet; adv_weight 1.33 for ResNet-34, 1.1 for a Wide ResNet, 1 for VGG.
    """

    steps: int = option(10, "of adaptation to a group", low=1)
    lr: float = option(2e-3, "learning rate of the copied generator; the generator's own is `steps` times it", low=0)
    lr_z: float = option(0.01, "learning rate of the latents", low=0)
    meta: str = option("fomaml", "what goes back into the generator", choices=("fomaml", "reptile"))
    cls_weight: float = option(0.5, "weight of the cross-entropy", low=0)
    bn_weight: float = option(10.0, "weight of the BatchNorm-statistics loss", low=0)
    adv_weight: float = option(1.0, "weight of the adversarial loss, which acts once there is a student", low=0)
    bn_momentum: float = option(0.9, "share of the groups before in the statistics", low=0, high=0.999)
    warmup: int = option(20, "groups before the adversarial loss acts", low=0)
    reset: int = option(120, "groups after those at which the generator's first layer is drawn anew; 0: never", low=0)
    latent: int = option(256, "numbers that an image is generated from", low=1)
    width: int = option(64, "channels of the generator's last map", low=1)
    view: str = option("crop-flip", "random view that the teacher sees at a step, as --augment", choices=VIEWS)


@dataclass(frozen=True)
class RunningBatchNorm(GuidanceLoss):
    """L_bn of `momentum` times the statistics `before` plus the rest of the group's own, by the 2-norms of bn_distance.

    before: (m1, variance), each [C], of every layer in the groups so far, m1 about the running mean; () in the first.
    """

    momentum: float = 0.0
    before: Sequence[tuple[Tensor, Tensor]] = field(default=(), compare=False)

    name = "bn"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"averages", "group"})

    def __call__(self, seen: Seen) -> Tensor:
        return seen.of_group(lambda averages: bn_distance(self.mixed(averages), seen.layers, "norm"))

    def mixed(self, averages: Sequence[Moments]) -> Sequence[Moments]:
        """The group's moments [1, C] of every layer, with the share of those before."""
        if not self.before:
            return averages
        mixed = []
        for (m1, m2), (mean, variance) in zip(averages, self.before, strict=True):
            m = torch.lerp(m1, mean, self.momentum)
            mixed.append(Moments(m, torch.lerp(m2 - m1.square(), variance, self.momentum) + m.square()))
        return mixed


class Fast(GroupMethod):
    """Synthesizer of groups of images by one generator, which goes on learning from group to group."""

    name = "fast"

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
        self.load_state_dict({})

    def losses(self) -> tuple[GuidanceLoss, ...]:
        own, waits = self.settings, self.episodes < self.settings.warmup
        statistics = RunningBatchNorm(own.bn_weight, own.bn_momentum, self.statistics)
        return CrossEntropy(own.cls_weight), statistics, Adversarial(0.0 if waits else own.adv_weight)

    def steps_of(self, groups: int) -> int:
        return groups * self.settings.steps

    def state_dict(self) -> dict[str, Tensor]:
        """Generator, its Adam, the statistics so far and the number of groups; {} before the first group."""
        if not self.episodes:
            return {}
        found = {**tensors_of("generator", self.generator), **tensors_of("adam", self.adam)}
        for layer, (mean, variance) in enumerate(self.statistics):
            found |= {f"statistics.{layer}.mean": mean.clone(), f"statistics.{layer}.variance": variance.clone()}
        return {**found, "episodes": torch.tensor(self.episodes)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there; from the beginning where it is {}."""
        own = self.settings
        self.generator = Generator(own.latent, own.width, self.image_size).to(self.device)
        self.adam = torch.optim.Adam(self.generator.parameters(), own.lr * own.steps, BETAS)
        self.episodes = int(state.get("episodes", 0))
        if state:
            give_tensors("generator", self.generator, state)
            give_tensors("adam", self.adam, state)
        layers = sum(name.startswith("statistics.") for name in state) // 2
        names = [(f"statistics.{layer}.mean", f"statistics.{layer}.variance") for layer in range(layers)]
        self.statistics = [(state[mean].to(self.device), state[var].to(self.device)) for mean, var in names]
        self.losses_change()

    def make(self, ids: Tensor, labels: Tensor, seed: int, stepped: Callable[[], None]) -> Made:
        own, number = self.settings, int(ids[0]) // self.group
        if not self.episodes:
            draw_weights(self.generator, seed, "fast generator", 0)
        if own.reset and self.episodes == own.warmup + own.reset:
            draw_weights(self.generator.first, seed, "fast generator", self.episodes)
        self.losses_change()  # they go by the groups before
        guidance, targets, views = self.guidance, labels.to(self.device), generator(seed, self.name, number)
        z = philox_normal(seed, ids.to(self.device), START, (own.latent,)).requires_grad_()
        learner, curve, side = copy.deepcopy(self.generator), LossCurve(own.steps), self.image_size
        parts: list[dict[str, Any]] = [{"params": learner.parameters()}, {"params": [z], "lr": own.lr_z}]
        adam = torch.optim.Adam(parts, own.lr, BETAS)
        common = [torch.zeros_like(weight) for weight in learner.parameters()]
        least, images, kept = z.new_empty(0), z.new_empty(0), dict[str, Tensor]()
        for step in range(own.steps):
            x = learner(z)
            shown = apply_views(x, draw(own.view, len(ids), side, side, views))
            seen = seen_whole(guidance, shown, targets, self.call_size)
            total, losses = total_of(guidance.losses, seen)
            curve.see(step, losses)
            self.require_finite(total.detach().expand(len(ids), 1), ids)
            if not images.numel() or total.detach() < least:
                least, images, kept = total.detach(), x.detach(), losses
            adam.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            for sum_, weight in zip(common, learner.parameters(), strict=True):
                assert weight.grad is not None
                sum_ += weight.grad
            adam.step()
            stepped()
        self._learn(common, learner)
        if seen.moments:
            mixed = RunningBatchNorm(1.0, own.bn_momentum, self.statistics).mixed(averaged(seen.moments))
            self.statistics = [(m1[0].detach(), (m2 - m1.square())[0].detach()) for m1, m2 in mixed]
        self.episodes += 1
        return Made(images, labels, kept, curve.stacked())

    def _learn(self, common: Sequence[Tensor], learner: Generator) -> None:
        """A step of the generator. common: the sum of the gradients of all steps of `learner`, by weight."""
        for weight, sum_, adapted in zip(self.generator.parameters(), common, learner.parameters(), strict=True):
            # Adam is free of the gradient's scale, so the published factor of Reptile's difference is left out
            weight.grad = sum_ if self.settings.meta == "fomaml" else weight.detach() - adapted.detach()
        self.adam.step()
