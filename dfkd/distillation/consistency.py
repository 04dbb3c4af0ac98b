"""mSARC in a distillation step: both networks' maps from the passes that a step makes anyway."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfkd.distillation.feature_maps import Places, Taken, find, tapped
from dfkd.distillation.msarc import Maps, class_activation_maps, grad_cams, msarc_loss
from dfkd.distillation.settings import DistillSettings
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


class Consistency:
    """Which maps of two networks are compared, and their loss.

    teacher, student: the modules that own the layers. The teacher's parameters are frozen: its maps are constants.
    size: side of the images. Raises UsageError where a network lacks the maps that the settings ask for.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, size: int, settings: DistillSettings) -> None:
        wanted = settings.msarc_maps != "gradcam", settings.msarc_maps != "cam"
        self.weight = settings.msarc_weight
        self.teacher, self.student = teacher.requires_grad_(False), student
        self.places = (
            find(teacher, size, "teacher", *wanted, settings.msarc_teacher_stages),
            find(student, size, "student", *wanted, settings.msarc_student_stages),
        )
        theirs, ours = (len(places.stages) for places in self.places)
        if theirs != ours:
            raise UsageError(
                f"{theirs} stages of the teacher and {ours} of the student",
                "every Grad-CAM of one is compared with one of the other",
                "name as many with --msarc-teacher-stages as with --msarc-student-stages",
            )

    def look(self, teacher: Network, student: Network, inputs: Tensor) -> Seen:
        """Both passes over normalised images; teacher and student call the modules, perhaps within a wrapper.

        Under autocast where the step is; loss() is not, since it takes gradients.
        """
        theirs, ours = self.places
        with torch.set_grad_enabled(bool(theirs.stages)), tapped(self.teacher, theirs, start_graph=True) as seen:
            wanted = teacher(inputs)
        with tapped(self.student, ours) as taken:
            answers = student(inputs)
        return Seen(wanted.detach(), answers, wanted, seen, taken)

    def loss(self, seen: Seen) -> Tensor:
        """msarc_weight times the loss of a step, a scalar on the student's graph."""
        theirs, ours = self.places
        choice = seen.teacher.argmax(1)
        target = _maps(seen.teacher_logits, choice, seen.teacher_taken, self.teacher, theirs, create_graph=False)
        maps = _maps(seen.student, choice, seen.student_taken, self.student, ours, create_graph=True)
        return self.weight * msarc_loss(maps, target)

    def in_words(self) -> str:
        """What is compared, for people."""
        pairs = [f"{theirs} with {ours}" for theirs, ours in zip(*(p.stages for p in self.places), strict=True)]
        heads = [place.head.last for place in self.places if place.head is not None]
        cams = [f"class activation maps of {' and '.join(heads)}"] if heads else []
        grads = [f"Grad-CAMs of the teacher's and the student's {', '.join(pairs)}"] if pairs else []
        return f"mSARC: {'; '.join([*cams, *grads])}"


def consistency(teacher: nn.Module, student: nn.Module, size: int, settings: DistillSettings) -> Consistency | None:
    """None where the weight is 0: nothing is looked for and nothing is taken."""
    return Consistency(teacher, student, size, settings) if settings.msarc_weight else None


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
