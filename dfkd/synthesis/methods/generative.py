"""A generator that is trained on the teacher alone, or against a student: DAFL (arXiv 1904.01186), DFQ (2005.04136).

One generator takes steps of Adam on fresh latents z, x = G(z), down

    cls CE(T(a(x)), argmax T) - act mean |f(a(x))| + entropy sum p log p, p the batch's mean answer   (DAFL)
    + bn L_bn(statistics of the batch) - adv KL(softmax T || softmax S)                               (DFQ)

with f the features that enter the teacher's last layer and a a random view. It chooses no labels: an image is labelled
by the teacher's likeliest class. Before the first group it takes `warmup` steps, then `steps` for every group.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd.config import VIEWS, GenerateConfig, option
from dfkd.data import apply_views, draw
from dfkd.errors import UsageError
from dfkd.runtime import generator
from dfkd.synthesis.losses import BatchNormLoss, GuidanceLoss, Seen
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
from dfkd.synthesis.synthesizer import Sample
from dfkd.teachers import Classifier
from dfkd_engine.priors.prior import Prior
from dfkd_kernels.philox import philox_normal

START = 0  # Philox stream of the latents that images are made from
BETAS = (0.5, 0.999)  # of Adam, as in DCGAN


@dataclass(frozen=True, kw_only=True)
class Settings(GroupSettings):
    """What stands in the parentheses of `generative(steps=20)`. Raises ValueError for values out of range.

    DFQ as published for CIFAR is the defaults; DAFL is bn_weight=0, adv_weight=0, act_weight=0.001, latent=512.
    """

    steps: int = option(50, "of Adam for a group", low=0)
    warmup: int = option(500, "of Adam before the first group", low=0)
    adv_weight: float = option(1.0, "weight of the adversarial loss, which acts once there is a student", low=0)
    act_weight: float = option(0.0, "weight of the size of the features before the teacher's last layer", low=0)
    entropy_weight: float = option(20.0, "weight of the classes' balance in a group", low=0)
    latent: int = option(256, "numbers that an image is generated from", low=1)
    width: int = option(64, "channels of the generator's last map", low=1)
    view: str = option("none", "random view that the teacher sees at a step, as --augment", choices=VIEWS)


@dataclass(frozen=True)
class OneHot(GuidanceLoss):
    """Cross-entropy of the teacher's answer and its likeliest class, among `classes`."""

    classes: tuple[int, ...] = ()

    name = "cls"

    def __call__(self, seen: Seen) -> Tensor:
        return F.cross_entropy(seen.logits, likeliest(seen.logits, self.classes), reduction="none")


@dataclass(frozen=True)
class Balance(GuidanceLoss):
    """Minus the entropy of the group's mean answer over `classes`: the same for every image, least for equal shares."""

    classes: tuple[int, ...] = ()

    name = "entropy"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"group"})

    def __call__(self, seen: Seen) -> Tensor:
        share = seen.logits[:, list(self.classes)].softmax(1).mean(0)
        return share.xlogy(share).sum().expand(len(seen.logits))


@dataclass(frozen=True)
class Activation(GuidanceLoss):
    """Minus the mean size of the features before the last layer, which `read` gives of the pass before, [G, features].

    Features are large where a network knows what it sees, so DAFL has it.
    """

    read: Callable[[], Tensor] = field(compare=False)

    name = "act"

    def __call__(self, seen: Seen) -> Tensor:
        return -self.read().abs().mean(1)


@dataclass(frozen=True)
class Disagreement(GuidanceLoss):
    """Minus KL(softmax T || softmax S), of every image, teacher and student both followed."""

    name = "adv"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"student"})

    def __call__(self, seen: Seen) -> Tensor:
        assert seen.student_logits is not None
        teacher, student = seen.logits.log_softmax(1), seen.student_logits.log_softmax(1)
        return -F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def likeliest(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """The class int64 [B] of the highest of these logits [B, C], among `classes`."""
    return torch.tensor(classes, device=logits.device)[logits[:, list(classes)].argmax(1)]


class Generative(GroupMethod):
    """Synthesizer of groups of images by one generator, which goes on learning from group to group.

    Raises UsageError as GroupMethod, and for a teacher without a linear layer of its classes at the end where
    act_weight is above 0.
    """

    name, takes_labels = "generative", False

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
        self.features: list[Tensor] = []
        self.last = self.teacher.last_linear()
        if own.act_weight and self.last is None:
            what = f"method {self.name}: teacher {teacher.architecture} has no linear layer of its classes at the end"
            raise UsageError(what, "act_weight is of the features that enter it", "use act_weight=0")
        self.load_state_dict({})

    def losses(self) -> tuple[GuidanceLoss, ...]:
        own = self.settings
        return (
            OneHot(own.cls_weight, self.classes),
            BatchNormLoss(own.bn_weight),
            Balance(own.entropy_weight, self.classes),
            Activation(own.act_weight, lambda: torch.cat(self.features)),
            Disagreement(own.adv_weight),
        )

    def steps_of(self, groups: int) -> int:
        return groups * self.settings.steps + (0 if self.taken else self.settings.warmup)

    def state_dict(self) -> dict[str, Tensor]:
        """Generator, its Adam and the number of steps; {} before the first."""
        if not self.taken:
            return {}
        learned = {**tensors_of("generator", self.generator), **tensors_of("adam", self.adam)}
        return {**learned, "steps": torch.tensor(self.taken)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there; from the beginning where it is {}."""
        own = self.settings
        self.generator = Generator(own.latent, own.width, self.image_size).to(self.device)
        self.adam = torch.optim.Adam(self.generator.parameters(), own.lr, BETAS)
        self.taken = int(state.get("steps", 0))
        if state:
            give_tensors("generator", self.generator, state)
            give_tensors("adam", self.adam, state)

    def __call__(self, ids: Sequence[int], labels: Sequence[int] | None = None, seed: int = 0) -> Sample:
        """Images of the ids, labelled by what the teacher sees in them. Raises UsageError where labels are asked."""
        if labels is not None:
            why, todo = "its images have the class that the teacher sees", "use another method, or no --candidates"
            raise UsageError("method generative was given labels", why, todo)
        return super().__call__(ids, None, seed)

    def make(self, ids: Tensor, labels: Tensor, seed: int, stepped: Callable[[], None]) -> Made:
        own = self.settings
        if not self.taken:
            draw_weights(self.generator, seed, "generative generator", 0)
        steps, losses = own.steps + (0 if self.taken else own.warmup), dict[str, Tensor]()
        curve = LossCurve(steps)
        for step in range(steps):
            losses = self._step(seed, len(ids), labels.to(self.device))
            curve.see(step, losses)
            stepped()
        with torch.no_grad():
            z = philox_normal(seed, ids.to(self.device), START, (own.latent,))
            images = (self.generator(z) * 255).round() / 255  # as they are stored, and labelled
            logits = [self.teacher.logits(part) for part in torch.split(images, self.call_size)]
            found = likeliest(torch.cat(logits), self.classes).cpu()
        return Made(images, found, losses, curve.stacked())

    def _step(self, seed: int, images: int, labels: Tensor) -> dict[str, Tensor]:
        """A step of the generator on fresh latents: its losses' means, for each image of the group."""
        own, numbers, side = self.settings, generator(seed, "generative", self.taken), self.image_size
        z = torch.randn(images, own.latent, generator=numbers).to(self.device)
        shown = apply_views(self.generator(z), draw(own.view, images, side, side, numbers))
        with self._recorded_features():
            seen = seen_whole(self.guidance, shown, labels, self.call_size)
        total, losses = total_of(self.guidance.losses, seen)
        self.adam.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        self.taken += 1
        return {name: value.mean().expand(images) for name, value in losses.items()}

    @contextmanager
    def _recorded_features(self) -> Iterator[None]:
        """Keep what enters the teacher's last layer inside, where a loss is of that."""
        self.features = []
        if self.last is None or not self.settings.act_weight:
            yield
            return
        handle = self.last.register_forward_pre_hook(lambda _, inputs: self.features.append(inputs[0]))
        try:
            yield
        finally:
            handle.remove()
