"""mSARC in a distillation step: both networks' maps from the passes that a step makes anyway."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfkd.training.feature_maps import Places, Taken, find, tapped
from dfkd.training.msarc import Maps, class_activation_maps, grad_cams, msarc_loss
from dfkd.training.settings import DistillSettings
from dfkd.errors import UsageError

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Seen:
    """One step's passes: logits [B, C] of the teacher, a constant, and of the student; and what loss() needs."""

    teacher: Tensor
    student: Tensor
    teacher_logits: Tensor  # the same, on the graph of its maps
    teacher_taken: Taken
    student_taken: Taken


@dataclass(frozen=True)
class Compared:
    """Whose maps are compared: places in the teacher and in the student."""

    teacher: Places
    student: Places

    def in_words(self) -> str:
        """For people."""
        heads = [place.head.last for place in (self.teacher, self.student) if place.head is not None]
        stages = [", ".join(place.stages) for place in (self.teacher, self.student) if place.stages]
        cams = [f"class activation maps of {heads[0]} (teacher) and {heads[1]} (student)"] if heads else []
        grads = [f"Grad-CAMs of {stages[0]} (teacher) and {stages[1]} (student)"] if stages else []
        return f"mSARC: {'; '.join([*cams, *grads])}"


def compared(teacher: nn.Module, student: nn.Module, size: int, settings: DistillSettings) -> Compared | None:
    """What mSARC compares on images of that side; None where its weight is 0, and then nothing is looked for.

    Raises UsageError where a network lacks the maps that the settings ask for.
    """
    if not settings.msarc_weight:
        return None
    wanted = settings.msarc_maps != "gradcam", settings.msarc_maps != "cam"
    theirs = find(teacher, size, "teacher", *wanted, settings.msarc_teacher_stages)
    ours = find(student, size, "student", *wanted, settings.msarc_student_stages)
    if len(theirs.stages) != len(ours.stages):
        raise UsageError(
            f"{len(theirs.stages)} stages of the teacher and {len(ours.stages)} of the student",
            "every Grad-CAM of one is compared with one of the other",
            "name as many with --msarc-teacher-stages as with --msarc-student-stages",
        )
    return Compared(theirs, ours)


class Consistency:
    """The loss of two networks' maps.

    teacher, student: the modules that own the layers. The teacher's parameters are frozen: its maps are constants.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, places: Compared, weight: float) -> None:
        self.teacher, self.student, self.weight = teacher.requires_grad_(False), student, weight
        self.places = places

    def look(self, teacher: Network, student: Network, inputs: Tensor) -> Seen:
        """Both passes over normalised images; teacher and student call the modules, perhaps within a wrapper.

        Under autocast where the step is; loss() is not, since it takes gradients.
        """
        theirs, ours = self.places.teacher, self.places.student
        with torch.set_grad_enabled(bool(theirs.stages)), tapped(self.teacher, theirs, start_graph=True) as seen:
            wanted = teacher(inputs)
        with tapped(self.student, ours) as taken:
            answers = student(inputs)
        return Seen(wanted.detach(), answers, wanted, seen, taken)

    def loss(self, seen: Seen) -> Tensor:
        """The weight times the loss of a step, a scalar on the student's graph."""
        theirs, ours = self.places.teacher, self.places.student
        choice = seen.teacher.argmax(1)
        target = _maps(seen.teacher_logits, choice, seen.teacher_taken, self.teacher, theirs, create_graph=False)
        maps = _maps(seen.student, choice, seen.student_taken, self.student, ours, create_graph=True)
        return self.weight * msarc_loss(maps, target)


def _maps(
    logits: Tensor, classes: Tensor, taken: Taken, network: nn.Module, places: Places, create_graph: bool
) -> Maps:
    cam = None
    if places.head is not None and taken.last is not None:
        weight = network.get_submodule(places.head.linear).weight
        assert isinstance(weight, Tensor)
        cam = class_activation_maps(taken.last, weight)
    found = grad_cams(logits, classes, taken.stages, create_graph) if taken.stages else ()
    return Maps(cam if create_graph or cam is None else cam.detach(), found)
