"""Contrastive model inversion (arXiv 2105.08584, IJCAI 2021): images that differ from those that were made before.

A group is inverted by a new generator and its own latents z, x = G(z), that take steps of Adam down

    cls CE(T(a(x)), y) + bn L_bn(statistics of the group) + adv L_adv(S) + cr L_cr
    L_cr = InfoNCE at temperature t of h(f(b(x))) against h(f(a(x))), which is held fixed, over the group and the bank

with a the global and b the local view, f the means of what enters the teacher's BatchNorm layers, h a small network to
vectors of unit length that learns beside the images, and the bank the features f of the newest images of the groups
before. The group's images are those of the step of least loss.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.config import VIEWS, GenerateConfig, option
from dfkd.data import apply_views, draw
from dfkd.errors import UsageError
from dfkd.runtime import generator
from dfkd.synthesis.losses import Adversarial, BatchNormLoss, CrossEntropy, GuidanceLoss, Seen
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
BETAS = (0.5, 0.999)  # of the generator's Adam, as in DCGAN


@dataclass(frozen=True, kw_only=True)
class Settings(GroupSettings):
    """What stands in the parentheses of `cmi(steps=500)`. Raises ValueError for values out of range.

    Published for CIFAR: groups of 256, 200 to 500 steps, and the defaults.
    """

    steps: int = option(200, "of Adam for a group", low=1)
    lr: float = option(1e-3, "learning rate of generator, latents and projection", low=0)
    adv_weight: float = option(0.5, "weight of the adversarial loss, which acts once there is a student", low=0)
    cr_weight: float = option(0.8, "weight of the contrastive loss", low=0)
    temperature: float = option(0.2, "of the contrastive loss", low=1e-3)
    bank: int = option(4096, "newest images before, which a group is to differ from", low=0, unit="images")
    head: int = option(128, "numbers that features are projected to", low=1)
    latent: int = option(256, "numbers that an image is generated from", low=1)
    width: int = option(64, "channels of the generator's last map", low=1)
    view: str = option("crop-flip", "global view that the teacher sees at a step, as --augment", choices=VIEWS)
    local_view: str = option("rrc-flip", "local view of the contrastive loss", choices=VIEWS)


class Projection(nn.Module):
    """Features [N, channels] -> vectors [N, size] of unit length."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, size))

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(self.layers(features), dim=1)


def features_of(seen: Seen) -> Tensor:
    """Means [G, sum of C_l] of what enters the BatchNorm layers, about their running means."""
    return torch.cat([m1 for m1, _ in seen.moments], 1)


@dataclass(frozen=True)
class Contrast(GuidanceLoss):
    """L_cr: how surely an image's local view is told to be of its own global view, plus the bank's mean of that.

    local: features [G, channels] of the local views. bank: local and global features of other images [N, 2 channels].
    """

    head: Projection = field(compare=False)
    bank: Tensor = field(compare=False)
    temperature: float
    local: Tensor | None = field(default=None, compare=False)

    name = "cr"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"moments", "group"})

    def __call__(self, seen: Seen) -> Tensor:
        assert self.local is not None
        banked = self.bank.chunk(2, dim=1)
        local, wide = (self.head(torch.cat(of)) for of in zip((self.local, features_of(seen)), banked, strict=True))
        scores = local @ wide.detach().T / self.temperature
        rows = F.cross_entropy(scores, torch.arange(len(scores), device=scores.device), reduction="none")
        own = rows[: len(self.local)]
        return own + rows[len(self.local) :].mean() if len(self.bank) else own


class CMI(GroupMethod):
    """Synthesizer of groups of images, which are to differ from each other and from those of the groups before.

    Raises UsageError as GroupMethod, and for a teacher without BatchNorm layers where cr_weight is above 0.
    """

    name = "cmi"

    def __init__(
        self,
        prior: Prior | None,
        teacher: Classifier,
        config: GenerateConfig,
        student: Classifier | None = None,
        **settings: Any,
    ) -> None:
        self.settings = own = settings_for(Settings, config, settings)
        super().__init__(teacher, config, own, student)
        if own.cr_weight and not self.teacher.batch_norms():
            what = f"method cmi: teacher {teacher.architecture} has no BatchNorm layer"
            raise UsageError(what, "their inputs are the features that its contrast is of", "use another method")
        self.channels = sum(layer.num_features for layer in self.teacher.batch_norms())
        self.load_state_dict({})

    def losses(self) -> tuple[GuidanceLoss, ...]:
        own = self.settings
        contrast = Contrast(own.cr_weight, self.head, self.bank, own.temperature)
        return CrossEntropy(own.cls_weight), BatchNormLoss(own.bn_weight), Adversarial(own.adv_weight), contrast

    def steps_of(self, groups: int) -> int:
        return groups * self.settings.steps

    def state_dict(self) -> dict[str, Tensor]:
        """Projection, its Adam, the bank and the number of groups; {} before the first group."""
        if not self.groups:
            return {}
        learned = {**tensors_of("head", self.head), **tensors_of("adam", self.adam)}
        return {**learned, "bank": self.bank.clone(), "groups": torch.tensor(self.groups)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there; from the beginning where it is {}."""
        self.head = Projection(max(self.channels, 1), self.settings.head).to(self.device)  # 1: unused, without layers
        self.adam = torch.optim.Adam(self.head.parameters(), self.settings.lr)
        self.bank = torch.zeros(0, 2 * self.channels, device=self.device)
        self.groups = int(state.get("groups", 0))
        if state:
            give_tensors("head", self.head, state)
            give_tensors("adam", self.adam, state)
            self.bank = state["bank"].to(self.device)

    def make(self, ids: Tensor, labels: Tensor, seed: int, stepped: Callable[[], None]) -> Made:
        own, number, side = self.settings, int(ids[0]) // self.group, self.image_size
        if not self.groups:
            draw_weights(self.head, seed, "cmi head", 0)
        inverter = Generator(own.latent, own.width, side).to(self.device)
        draw_weights(inverter, seed, "cmi generator", number)
        z = philox_normal(seed, ids.to(self.device), START, (own.latent,)).requires_grad_()
        self.losses_change()  # they go by the bank
        guidance, targets, views = self.guidance, labels.to(self.device), generator(seed, self.name, number)
        adam, curve = torch.optim.Adam([*inverter.parameters(), z], own.lr, BETAS), LossCurve(own.steps)

        def features(x: Tensor) -> Tensor:
            local = apply_views(x, draw(own.local_view, len(ids), side, side, views))
            return features_of(seen_whole(guidance, local, targets, self.call_size))

        least, images, newest, kept = z.new_empty(0), z.new_empty(0), self.bank[:0], dict[str, Tensor]()
        for step in range(own.steps):
            x = inverter(z)
            shown = apply_views(x, draw(own.view, len(ids), side, side, views))
            seen, found = seen_whole(guidance, shown, targets, self.call_size), guidance.losses
            if own.cr_weight:
                local = features(x)
                found = tuple(replace(loss, local=local) if isinstance(loss, Contrast) else loss for loss in found)
            total, losses = total_of(found, seen)
            curve.see(step, losses)
            self.require_finite(total.detach().expand(len(ids), 1), ids)
            if not images.numel() or total.detach() < least:
                least, images, kept = total.detach(), x.detach(), losses
                newest = torch.cat((local, features_of(seen)), 1).detach() if own.cr_weight else newest
            for part in (adam, self.adam):
                part.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            for part in (adam, self.adam):
                part.step()
            stepped()
        self.bank = torch.cat((self.bank, newest))[max(len(self.bank) + len(newest) - own.bank, 0) :]
        self.groups += 1
        return Made(images, labels, kept, curve.stacked())
