"""DeepInversion (arXiv 1912.08795): pixels optimised from noise until the teacher sees its own training data in them.

    x  <-  Adam on   CE(T(view(x)), y) + bn_weight L_bn(statistics of the group) + tv_weight TV(view(x)),   x in 0..1

with L_bn relative to each layer's scale and a view that is a random shift, and a flip where asked for, new at each
step and the same for the whole group. No prior enters; guided diffusion is measured against it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, get_type_hints

import torch
from torch import Tensor

from dfkd.config import GenerateConfig
from dfkd.config.fields import convert
from dfkd.data import Record
from dfkd.extension import settings_of
from dfkd.runtime import choose_kernels, generator
from dfkd.synthesis.finite import require_finite
from dfkd.synthesis.guidance import Guidance
from dfkd.synthesis.losses import BatchNormLoss, CrossEntropy, GuidanceLoss, Seen
from dfkd.synthesis.prompts import chosen_classes, labels_of
from dfkd.synthesis.synthesizer import Sample, counted, label_probability, own_size, records_of
from dfkd.teachers import Classifier
from dfkd_engine.priors.prior import Prior
from dfkd_kernels.philox import philox_uniform

START = 0  # Philox stream


@dataclass(frozen=True)
class Settings:
    """What stands in the parentheses of `deepinversion(steps=200)`.

    steps: of Adam, with the learning rate `lr`. bn_weight, tv_weight: of the losses beside a cross-entropy of weight 1.
    shift: most pixels of the random shift. flip: mirror every second view or so; not where left and right differ, as in
    digits. group: images whose BatchNorm statistics are one loss, classes mixed; 0: --group.
    Raises ValueError for a value of another type, and for a negative number.
    """

    steps: int = 500
    lr: float = 0.2
    bn_weight: float = 10.0
    tv_weight: float = 0.05
    shift: int = 2
    flip: bool = False
    group: int = 0

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Settings).items():
            try:
                value = convert(getattr(self, name), kind)
            except ValueError as error:
                raise ValueError(f"{name} is {getattr(self, name)!r}: {error}") from None
            if value < 0:
                raise ValueError(f"{name} is {value}: it must be at least 0")
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class TotalVariation(GuidanceLoss):
    """Mean absolute difference of neighbouring pixels, down and across."""

    name = "tv"

    def __call__(self, seen: Seen) -> Tensor:
        return sum((seen.images.diff(dim=d).abs().mean((1, 2, 3)) for d in (2, 3)), seen.logits.new_zeros(()))


class DeepInversion:
    """Synthesizer of groups of images, each group from its own noise by `Settings`."""

    name = "deepinversion"
    needs_prior = False
    on_progress: Callable[[float], object] | None = None
    reads = ("size", "only", "group", "kernels")

    def __init__(self, prior: Prior | None, teacher: Classifier, config: GenerateConfig, **settings: Any) -> None:
        with settings_of(f"method {config.method!r}"):
            self.settings = Settings(**settings)
        self.teacher = teacher = teacher.tried()
        self.class_names, self.image_size = teacher.class_names, own_size(config, teacher)
        self.classes = chosen_classes(teacher.class_names, config.sampling.only)
        self.group, self.call_size = self.settings.group or config.batching.group, config.batching.batch
        self.device = teacher.device
        weights = self.settings.bn_weight, self.settings.tv_weight
        losses = (CrossEntropy(1.0), BatchNormLoss(weights[0], "group", "relative"), TotalVariation(weights[1]))
        kernels = choose_kernels(config.compute.kernels, self.device).name
        weighted = [loss for loss in losses if loss.weight]
        self.guidance = Guidance(lambda images: images, teacher, weighted, kernels=kernels)

    def identity(self) -> Mapping[str, Any]:
        """Settings, size, classes and the teacher."""
        settings = {**asdict(self.settings), "group": self.group, "size": self.image_size}
        return {**settings, "classes": list(self.classes), "teacher_digest": self.teacher.digest()}

    def __call__(self, ids: Sequence[int], labels: Sequence[int] | None = None, seed: int = 0) -> Sample:
        """Images of the ids, whose groups are optimised whole; steps and views follow from the seed and the group.

        labels: of the asked images; the others of their groups keep theirs.
        """
        asked = [int(i) for i in ids]
        given = {} if labels is None else dict(zip(asked, labels, strict=True))
        found: dict[int, tuple[Tensor, Record]] = {}
        groups = list(dict.fromkeys(i // self.group for i in asked))
        stepped = counted(len(groups) * self.settings.steps, self.on_progress)
        for number in groups:
            members = torch.arange(number * self.group, (number + 1) * self.group)
            targets = labels_of(members, self.classes)
            for place, image in enumerate(members.tolist()):
                targets[place] = given.get(image, targets[place])
            images, losses = self._optimised(members, targets, seed, stepped)
            sure = label_probability(self.teacher, images, targets, self.call_size)
            records = records_of(members.tolist(), targets, self.class_names, seed, sure, losses)
            found |= {record.id: (images[i], record) for i, record in enumerate(records)}
        records = tuple(found[i][1] for i in asked)
        return Sample(torch.stack([found[i][0] for i in asked]), torch.tensor([r.label for r in records]), records)

    def _optimised(
        self, ids: Tensor, labels: Tensor, seed: int, stepped: Callable[[], None]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One group: images uint8 [G, 3, H, W] on the CPU and their losses at the last step, {name: [G]}."""
        own, shape = self.settings, (3, self.image_size, self.image_size)
        views = generator(seed, "deepinversion", int(ids[0]) // self.group)
        x = philox_uniform(seed, ids.to(self.device), START, shape).requires_grad_()
        labels, losses = labels.to(self.device), dict[str, Tensor]()
        adam = torch.optim.Adam([x], lr=own.lr)
        for _ in range(own.steps):
            shift = torch.randint(-own.shift, own.shift + 1, (2,), generator=views).tolist()
            flip = bool(torch.rand((), generator=views) < 0.5) and own.flip

            view = partial(_view, shift, flip)
            x.grad, losses = self.guidance.gradient(x.detach(), labels, self.call_size, view)
            adam.step()
            x.data.clamp_(0, 1)
            stepped()
        require_finite(x.detach(), ids, "lower lr, as in deepinversion(lr=0.05), or bn_weight")
        return (x.detach() * 255).round().to(torch.uint8).cpu(), losses


def _view(shift: Sequence[int], flip: bool, z: Tensor, images: Tensor) -> Tensor:
    """Images z [B, 3, H, W] moved down and right, what leaves an edge coming in at the other, and mirrored."""
    z = z.roll(tuple(shift), (2, 3))
    return z.flip(3) if flip else z
