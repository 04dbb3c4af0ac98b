"""Losses of distillation: each an object with a weight, a name and `__call__`.

A loss of one's own is one file with a frozen dataclass, given as `--loss my.py:Hint(weight=0.1)`:

    @dataclass(frozen=True)
    class Hint(DistillLoss):
        name = "hint"
        teacher_layers = student_layers = ("layer3",)

        def __call__(self, seen: Seen) -> Tensor:
            return F.mse_loss(seen.student_maps["layer3"], seen.teacher_maps["layer3"])

Its fields and the digest of its file enter the identity of the run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.config import DistillConfig
from dfkd.errors import UsageError
from dfkd.extension import make
from dfkd.teachers.committee import Committee
from dfkd_kernels.soft_kl import divergence, soft_kl

Network = Callable[..., Tensor]  # of images, or of what else a training gives its network


@dataclass(frozen=True)
class Seen:
    """One training batch as the losses see it.

    images: normalised, viewed and mixed, [B, 3, H, W]; labels: int64 [B], of the images before mixing.
    student, teacher: logits [B, C] in any float dtype; the teacher's are constant.
    student_maps, teacher_maps: outputs of the modules that a loss names, by module name; the teacher's are constant.
    teacher_graph: the teacher's logits and maps on their autograd graph, where a loss has `teacher_gradients`.
    """

    images: Tensor
    labels: Tensor
    student: Tensor
    teacher: Tensor
    student_maps: Mapping[str, Tensor] = field(default_factory=dict)
    teacher_maps: Mapping[str, Tensor] = field(default_factory=dict)
    teacher_graph: tuple[Tensor, Mapping[str, Tensor]] | None = None


@dataclass(frozen=True)
class DistillLoss:
    """Base of a distillation loss; the sum of `weight` times each is what the student descends.

    name: for people. teacher_layers, student_layers: modules whose outputs `Seen` shall hold; a subclass may have them
    as class attributes or as fields. teacher_gradients: whether the loss differentiates the teacher's logits.
    """

    weight: float = 1.0
    name: ClassVar[str] = ""

    @property
    def teacher_gradients(self) -> bool:
        return False

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        return ()

    @property
    def student_layers(self) -> tuple[str, ...]:
        return ()

    def bind(self, teacher: nn.Module, student: nn.Module, size: int) -> "DistillLoss":
        """The loss made for two networks, on images of side `size`; itself where it needs to know nothing of them.

        Called once, before the first step. Raises UsageError for networks that it cannot compare.
        """
        return self

    def describe(self) -> str:
        """Weight and name of the loss, for the line that a training prints as it begins."""
        return f"{self.weight:g} {self.name or type(self).__name__}"

    def __call__(self, seen: Seen) -> Tensor:
        """A scalar on the student's graph, float32 at least, without the weight."""
        raise NotImplementedError


@dataclass(frozen=True)
class KullbackLeibler(DistillLoss):
    """T^2 KL(softmax(t / T) || softmax(s / T)), mean over the batch (Hinton et al., arXiv:1503.02531).

    T^2 keeps the gradient's size as T grows. kernels: "torch", or "triton" for one launch that makes the gradient too;
    they differ by rounding.
    """

    name = "kl"
    temperature: float = 4.0
    kernels: str = "torch"

    def __call__(self, seen: Seen) -> Tensor:
        if self.kernels == "triton":
            return soft_kl(seen.student, seen.teacher, self.temperature).mean()
        return kl_at_temperature(seen.student, seen.teacher, self.temperature)


@dataclass(frozen=True)
class OwnTeachers(DistillLoss):
    """T^2 KL(p || softmax(s / T)), mean over the batch, with p of those teachers alone that know the image's class.

    p is `Committee.told`, softened by T: 0 for classes that none of them knows, which the student unlearns there
    (FedCADO's specific teachers, arXiv 2311.08870).
    """

    name = "kl_own_teachers"
    temperature: float = 4.0
    committee: Committee | None = None

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        return tuple(f"members.{k}" for k in range(len(self.committee.members if self.committee else ())))

    def __call__(self, seen: Seen) -> Tensor:
        assert self.committee is not None
        logits = [wide(seen.teacher_maps[name]) for name in self.teacher_layers]
        wanted = self.committee.told(logits, seen.labels, self.temperature)
        answers = (wide(seen.student) / self.temperature).log_softmax(1)
        return self.temperature**2 * (torch.xlogy(wanted, wanted) - wanted * answers).sum() / len(answers)


@dataclass(frozen=True)
class CrossEntropy(DistillLoss):
    """Cross-entropy of the student's logits with the labels, mean over the batch."""

    name = "cross_entropy"

    def __call__(self, seen: Seen) -> Tensor:
        return F.cross_entropy(wide(seen.student), seen.labels)


LOSSES: dict[str, Any] = {"kl": KullbackLeibler, "cross_entropy": CrossEntropy}


def kl_at_temperature(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The equation of `KullbackLeibler`: logits [B, C], any float dtype -> a scalar in float32 (float64 stays)."""
    return temperature**2 * (divergence(student, teacher, temperature).sum() / len(student))


def wide(value: Tensor) -> Tensor:
    """`value` in float32 at least, in which losses are computed."""
    return value if value.element_size() >= 4 else value.float()


def own_losses(config: DistillConfig) -> tuple[DistillLoss, ...]:
    """The losses that `--loss` names. Raises UsageError for what is not there or is no DistillLoss."""
    found = tuple(make(text, LOSSES, "distillation loss") for text in config.losses)
    for text, loss in zip(config.losses, found, strict=True):
        if not isinstance(loss, DistillLoss):
            todo = "derive it from dfkd.training.losses.DistillLoss"
            raise UsageError(f"--loss {text}", f"it gives a {type(loss).__name__}, which is no distillation loss", todo)
    return found


class Objective:
    """Loss of a training batch: the passes of both networks, then the weighted sum of the losses.

    teacher, student: the modules that own the layers which losses name; the teacher is frozen.
    call_teacher: the teacher as it is called, perhaps compiled. autocast: makes the context of both passes; losses are
    computed outside of it.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        losses: Sequence[DistillLoss],
        autocast: Callable[[], AbstractContextManager[Any]],
        call_teacher: Network | None = None,
    ) -> None:
        self._teacher, self._student = teacher.requires_grad_(False), student
        self._losses, self._autocast, self._call_teacher = losses, autocast, call_teacher or teacher
        self.teacher_layers = tuple(dict.fromkeys(name for loss in losses for name in loss.teacher_layers))
        self.student_layers = tuple(dict.fromkeys(name for loss in losses for name in loss.student_layers))
        self._gradients = any(loss.teacher_gradients for loss in losses)

    def __call__(self, network: Network, images: Tensor, labels: Tensor) -> Tensor:
        """A scalar; `network` is the student as it is called in training (compiled, or within DDP)."""
        seen = self.look(network, images, labels)
        return torch.stack([loss.weight * loss(seen) for loss in self._losses]).sum()

    def look(self, network: Network, images: Tensor, labels: Tensor) -> Seen:
        """Both passes over normalised images [B, 3, H, W]."""
        with self._autocast():
            with (
                torch.set_grad_enabled(self._gradients),
                record_outputs(self._teacher, self.teacher_layers, self._gradients) as theirs,
            ):
                wanted = self._call_teacher(images)
            with record_outputs(self._student, self.student_layers) as ours:
                answers = network(images)
        constant = {name: value.detach() for name, value in theirs.items()}
        graph = (wanted, theirs) if self._gradients else None
        return Seen(images, labels, answers, wanted.detach(), ours, constant, graph)


@contextmanager
def record_outputs(network: nn.Module, names: Sequence[str], start_graph: bool = False) -> Iterator[dict[str, Tensor]]:
    """Collect what modules give in a forward pass within the block, by module name.

    start_graph: the first of them begins the autograd graph, for a frozen network that would have none. A module that
    is called several times leaves what it gave last. Raises UsageError for a module that is not there.
    """
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], Tensor | None]:
        def take(module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
            found[name] = output
            if not start_graph or output.requires_grad:
                return None
            # A copy, since a layer that works in place may follow, which autograd forbids on the graph's first tensor.
            found[name] = output.detach().requires_grad_().clone()
            return found[name]

        return take

    handles = []
    try:
        for name in names:
            handles.append(_module(network, name).register_forward_hook(hook(name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _module(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        known = ", ".join(child for child, _ in network.named_children())
        raise UsageError(f"{type(network).__name__} has no module {name!r}", f"it has {known}") from None
