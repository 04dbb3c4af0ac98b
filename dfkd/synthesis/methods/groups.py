"""What methods without a prior share that optimise a group of images together: groups, losses, records.

A group of images is made at once, from (seed, number of the group) and, by methods that learn from their groups, from
the groups before. Losses are those of guidance (losses.py): the sum over losses of weight times the mean over images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dfkd.config import Config, GenerateConfig, leaves, option
from dfkd.data import Record
from dfkd.errors import SettingError, UsageError
from dfkd.extension import settings_of
from dfkd.runtime import choose_kernels
from dfkd.synthesis.batching import cuts
from dfkd.synthesis.bn_statistics import FusedTeacher, averaged_over, joined
from dfkd.synthesis.checks import copy_student
from dfkd.synthesis.finite import require_finite
from dfkd.synthesis.guidance import Guidance, identity
from dfkd.synthesis.losses import GuidanceLoss, Seen
from dfkd.synthesis.prompts import chosen_classes, labels_of
from dfkd.synthesis.synthesizer import Sample, counted, label_probability, own_size, records_of
from dfkd.synthesis.teacher_precision import narrowed
from dfkd.teachers import Classifier

POINTS = 20  # of a recorded loss curve, at most

S = TypeVar("S", bound=Config)


@dataclass(frozen=True, kw_only=True)
class GroupSettings(Config):
    """What stands in the parentheses of `--method NAME(setting=value)`: weights of losses, and the group's size."""

    lr: float = option(1e-3, "learning rate of Adam", low=0)
    cls_weight: float = option(1.0, "weight of the cross-entropy", low=0)
    bn_weight: float = option(1.0, "weight of the BatchNorm-statistics loss", low=0)
    adv_weight: float = option(0.0, "weight of the adversarial loss, which acts once there is a student", low=0)
    group: int = option(0, "images that are made together, classes mixed; 0: --group", low=0, unit="images")

    def validate(self) -> None:
        if not any(value for name, value in self.flat().items() if name in ("cls_weight", "bn_weight")):
            raise ValueError("cls_weight and bn_weight are 0: without one of them the teacher says nothing")


@dataclass
class LossCurve:
    """The losses {name: [G]} of at most POINTS of `steps` steps, evenly spread, the first and the last among them."""

    steps: int
    points: list[Mapping[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        shown = min(POINTS, self.steps)
        self.shown = {round(i * (self.steps - 1) / max(shown - 1, 1)) for i in range(shown)}

    def see(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Keep the losses of a step, counted from 0, where it is one of those that are shown."""
        if step in self.shown:
            self.points.append(losses)

    def stacked(self) -> dict[str, Tensor]:
        """{name: [G, points]} on the CPU; a loss that came later has fewer points."""
        names = dict.fromkeys(name for point in self.points for name in point)
        return {name: torch.stack([p[name] for p in self.points if name in p], 1).cpu() for name in names}


@dataclass(frozen=True)
class Made:
    """One group. images: [G, 3, H, W] in 0..1. labels: int64 [G] on the CPU. losses: the final ones, {name: [G]}.

    curve: {name: [G, points]}, the losses of some of the steps.
    """

    images: Tensor
    labels: Tensor
    losses: Mapping[str, Tensor]
    curve: Mapping[str, Tensor]


class GroupMethod:
    """Synthesizer of groups of images, which a subclass makes in `make`.

    student: of the adversarial loss; None leaves that loss out until `update` brings one.
    Raises UsageError: settings that the method does not take, a teacher without BatchNorm layers where bn_weight is
    above 0, or a student where adv_weight is 0.
    """

    name: str
    needs_prior = False
    on_progress: Callable[[float], object] | None = None
    reads = ("size", "only", "group", "kernels", "teacher_dtype")

    def __init__(
        self, teacher: Classifier, config: GenerateConfig, settings: GroupSettings, student: Classifier | None
    ) -> None:
        self.own_settings, self._chosen = settings, config.candidates.takes_student
        self.teacher = teacher = teacher.tried()
        self.class_names, self.image_size = teacher.class_names, own_size(config, teacher)
        self.classes = chosen_classes(teacher.class_names, config.sampling.only)
        self.group, self.call_size = settings.group or config.batching.group, config.batching.batch
        self.device, self.teacher_dtype = teacher.device, config.compute.teacher_dtype
        self.kernels = choose_kernels(config.compute.kernels, self.device).name
        if settings.bn_weight and not teacher.batch_norms():
            what = f"method {self.name}: teacher {teacher.architecture} has no BatchNorm layer"
            raise UsageError(what, "its bn_weight is of their statistics", f"use {self.name}(bn_weight=0)")
        self.student = self._taken(student)
        self.student_digest = self.student.digest() if self.student else None
        self._guidance: Guidance | None = None
        self._fused: FusedTeacher | None = None

    def losses(self) -> tuple[GuidanceLoss, ...]:
        """All losses of the method, those of weight 0 and those that wait for a student among them."""
        raise NotImplementedError

    def steps_of(self, groups: int) -> int:
        """Optimisation steps of so many groups from now on."""
        raise NotImplementedError

    def make(self, ids: Tensor, labels: Tensor, seed: int, stepped: Callable[[], None]) -> Made:
        """One group, by the teacher on its device. ids, labels: int64 [G] on the CPU, ids consecutive.

        stepped: called after every optimisation step. Raises NotFinite.
        """
        raise NotImplementedError

    def describe(self) -> list[str]:
        """Lines for people before the run: losses that do not act yet."""
        if self.own_settings.adv_weight and self.student is None:
            return [f"method {self.name}: no student yet, so the adversarial loss does not act"]
        return []

    def update(self, student: Classifier | None) -> None:
        """Replace the student of the adversarial loss. Raises UsageError where its classes are not the teacher's, and
        where adv_weight is 0 and --keep learnable has no use for it either."""
        self.student = self._taken(student)
        self.losses_change()

    def _taken(self, student: Classifier | None) -> Classifier | None:
        if self.own_settings.adv_weight:
            return student and copy_student(student, self.teacher)
        if student is not None and not self._chosen:  # else candidates alone go by it
            what = f"method {self.name} has a student"
            raise UsageError(what, "its adv_weight is 0", f"use {self.name}(adv_weight=1), or leave the student out")
        return None

    def identity(self) -> Mapping[str, Any]:
        """Settings, size, classes, the teacher, and the student that was there first."""
        settings = {**self.own_settings.identity(), "group": self.group, "size": self.image_size}
        settings |= {} if self.teacher_dtype == "fp32" else {"teacher_dtype": self.teacher_dtype}
        student = {"student_digest": self.student_digest} if self.student_digest else {}
        return {**settings, **student, "classes": list(self.classes), "teacher_digest": self.teacher.digest()}

    @property
    def guidance(self) -> Guidance:
        """Teacher and student as the losses that act see them."""
        if self._guidance is None:
            losses = [loss for loss in self.losses() if loss.weight and (self.student or "student" not in loss.needs)]
            teacher = narrowed(self.teacher, self.teacher_dtype)
            self._guidance = Guidance(identity, teacher, losses, self.student, kernels=self.kernels, fused=self._fused)
            self._fused = self._guidance.fused
        return self._guidance

    def require_finite(self, values: Tensor, ids: Tensor) -> None:
        """Raise NotFinite for images of which some of the values [G, ...] are not."""
        lower = f"lower lr, as in {self.name}(lr={self.own_settings.lr / 4:g}), or bn_weight"
        require_finite(values, ids, lower)

    def losses_change(self) -> None:
        """Have `losses` asked anew before the next step."""
        self._guidance = None

    def __call__(self, ids: Sequence[int], labels: Sequence[int] | None = None, seed: int = 0) -> Sample:
        """Images of the ids, whose groups are made whole, in the order in which they are asked for.

        labels: of the asked images; the others of their groups keep theirs.
        """
        asked = [int(i) for i in ids]
        given = {} if labels is None else dict(zip(asked, labels, strict=True))
        found: dict[int, tuple[Tensor, Record]] = {}
        groups = list(dict.fromkeys(i // self.group for i in asked))
        stepped = counted(self.steps_of(len(groups)), self.on_progress)
        for number in groups:
            members = torch.arange(number * self.group, (number + 1) * self.group)
            targets = labels_of(members, self.classes)
            for place, image in enumerate(members.tolist()):
                targets[place] = given.get(image, targets[place])
            with torch.enable_grad():  # whoever asks for images may have turned gradients off
                made = self.make(members, targets, seed, stepped)
            self.require_finite(made.images, members)
            images = (made.images * 255).round().to(torch.uint8).cpu()
            sure = label_probability(self.teacher, images, made.labels, self.call_size)
            of = members.tolist(), made.labels, self.class_names, seed, sure, made.losses, made.curve
            records = records_of(*of)
            found |= {record.id: (images[i], record) for i, record in enumerate(records)}
        records = tuple(found[i][1] for i in asked)
        return Sample(torch.stack([found[i][0] for i in asked]), torch.tensor([r.label for r in records]), records)


def settings_for(kind: type[S], config: GenerateConfig, given: Mapping[str, Any]) -> S:
    """The settings in a method's parentheses. Raises UsageError: one that is unknown, or a value that is refused."""
    with settings_of(f"method {config.method!r}"):
        if unknown := sorted(given.keys() - leaves(kind).keys()):
            raise SettingError(f"it has no setting {unknown[0]!r}; it has {', '.join(leaves(kind))}")
        return kind.of(**given)


def seen_whole(guidance: Guidance, images: Tensor, labels: Tensor, batch: int) -> Seen:
    """What the losses are functions of, for a whole group [G, 3, H, W] in calls of `batch`, differentiable.

    A group that takes several calls keeps none of their activations: each is run again on the way back.
    """
    calls = list(cuts(len(images), batch))
    if len(calls) == 1:
        return guidance.seen(images, labels)
    run = partial(checkpoint, guidance.seen, use_reentrant=False)
    parts = [cast(Seen, run(images[cut], labels[cut])) for cut in calls]
    students = [part.student_logits for part in parts if part.student_logits is not None]
    moments, sizes = [part.moments for part in parts], [len(images[cut]) for cut in calls]
    return replace(
        parts[0],
        images=images,
        labels=labels,
        logits=torch.cat([part.logits for part in parts]),
        moments=joined(moments) if "moments" in guidance.needs else averaged_over(moments, sizes),
        student_logits=torch.cat(students) if students else None,
    )


def total_of(losses: Sequence[GuidanceLoss], seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over losses of weight times mean over the group, to be differentiated, and the losses {name: [G]}."""
    values = {loss.name: loss(seen) for loss in losses}
    total = torch.stack([loss.weight * values[loss.name].mean() for loss in losses]).sum()
    return total, {name: value.detach() for name, value in values.items()}
