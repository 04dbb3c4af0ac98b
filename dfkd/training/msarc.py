"""mSARC: the student should look where the teacher looks.

The multi-scale spatial activation region consistency of SpaceshipNet (Yu et al., CVPR 2023). With the last feature map
F [B, D, h, w], the final linear layer's weights W [C, D], feature maps A_l [B, K, h, w] of three stages and the
teacher's first choice c,

    CAM      M   = W F                                     every class, W as a 1x1 convolution (Zhou et al., CVPR 2016)
    Grad-CAM G_l = sum_k mean_hw(d logit_c / d A_lk) A_lk  (Selvaraju et al., arXiv:1610.02391, without its ReLU)
    loss         = mean (M_s - M_t)^2 + sum_l mean (G_l,s - G_l,t)^2

Maps are compared as they are: the authors' code has no ReLU and no normalisation either. Two points differ from it. It
holds the gradient in G_l and the weights in M constant; here both belong to the student's graph, so that descent
follows the loss that is written above. And its pairs have maps of one size; here the larger map is brought to the
smaller one's size, which keeps what a map means: the average of a CAM is the logit (less the bias), so CAMs are
averaged, and the sum of a Grad-CAM is what the stage adds to the logit, so Grad-CAMs are summed.

Their KL divergence is a mean over batch and classes and stands beside this loss with weight 1. Beside a mean over the
batch, which is how it is taken here, that is a weight of C.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.config import MsarcConfig
from dfkd.errors import UsageError
from dfkd.training.feature_maps import Places, find
from dfkd.training.losses import DistillLoss, Seen, wide

# float16 loses a gradient below 6e-8, and a logit's in an early map of many cells is not far from there.
FP16_SCALE = 2.0**10


@dataclass(frozen=True)
class Maps:
    """What a network looked at: cam [B, C, h, w] or None, grad_cams each [B, h, w]; float32 (float64 stays)."""

    cam: Tensor | None
    grad_cams: tuple[Tensor, ...]


@dataclass(frozen=True)
class Msarc(DistillLoss):
    """The loss as the settings ask for it; `bind` finds the maps in two networks."""

    name = "msarc"
    maps: str = "both"
    teacher_stages: tuple[str, ...] = ()
    student_stages: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: MsarcConfig) -> "Msarc":
        return cls(config.weight, config.maps, config.teacher_stages, config.student_stages)

    def bind(self, teacher: nn.Module, student: nn.Module, size: int) -> "BoundMsarc":
        """Raises UsageError where a network lacks the maps that are asked for."""
        wanted = self.maps != "gradcam", self.maps != "cam"
        theirs = find(teacher, size, "teacher", *wanted, self.teacher_stages)
        ours = find(student, size, "student", *wanted, self.student_stages)
        if len(theirs.stages) != len(ours.stages):
            raise UsageError(
                f"{len(theirs.stages)} stages of the teacher and {len(ours.stages)} of the student",
                "every Grad-CAM of one is compared with one of the other",
                "name as many with --msarc-teacher-stages as with --msarc-student-stages",
            )
        return BoundMsarc(weight=self.weight, teacher=teacher, student=student, theirs=theirs, ours=ours)


@dataclass(frozen=True, kw_only=True)
class BoundMsarc(DistillLoss):
    """mSARC between the maps at `theirs` in the teacher and at `ours` in the student."""

    name = "msarc"
    teacher: nn.Module
    student: nn.Module
    theirs: Places
    ours: Places

    @property
    def teacher_gradients(self) -> bool:
        return bool(self.theirs.stages)

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        return self.theirs.modules()

    @property
    def student_layers(self) -> tuple[str, ...]:
        return self.ours.modules()

    def describe(self) -> str:
        """Weight of the loss and the modules whose maps it compares, for the line that a training prints."""
        heads = [place.head.last for place in (self.theirs, self.ours) if place.head is not None]
        stages = [", ".join(place.stages) for place in (self.theirs, self.ours) if place.stages]
        cams = [f"class activation maps of {heads[0]} (teacher) and {heads[1]} (student)"] if heads else []
        grads = [f"Grad-CAMs of {stages[0]} (teacher) and {stages[1]} (student)"] if stages else []
        return f"{self.weight:g} mSARC ({'; '.join([*cams, *grads])})"

    def __call__(self, seen: Seen) -> Tensor:
        choice = seen.teacher.argmax(1)
        logits, maps = seen.teacher_graph or (seen.teacher, seen.teacher_maps)
        target = _maps(logits, choice, maps, self.teacher, self.theirs, create_graph=False)
        found = _maps(seen.student, choice, seen.student_maps, self.student, self.ours, create_graph=True)
        return msarc_loss(found, target)


def _maps(
    logits: Tensor,
    classes: Tensor,
    outputs: Mapping[str, Tensor],
    network: nn.Module,
    places: Places,
    create_graph: bool,
) -> Maps:
    cam = None
    if places.head is not None:
        weight = network.get_submodule(places.head.linear).weight
        assert isinstance(weight, Tensor)
        last = outputs[places.head.last]
        cam = class_activation_maps(F.relu(last) if places.head.relu else last, weight)
        cam = cam if create_graph else cam.detach()
    stages = [outputs[name] for name in places.stages]
    return Maps(cam, grad_cams(logits, classes, stages, create_graph) if stages else ())


def class_activation_maps(features: Tensor, weight: Tensor) -> Tensor:
    """M [B, C, h, w] of a last feature map [B, D, h, w] and the final weights [C, D], differentiable in both."""
    features = wide(features)
    return F.conv2d(features, weight.to(features.dtype)[:, :, None, None])


def grad_cams(logits: Tensor, classes: Tensor, features: Sequence[Tensor], create_graph: bool) -> tuple[Tensor, ...]:
    """G_l [B, h, w] for the logits [B, C] at classes int64 [B], of every feature map [B, K, h, w] that they come from.

    create_graph: the maps can be differentiated, to the second order in the network (a student's); without it they are
    constants and the graph of the logits is used up (a teacher's).
    The gradient is that of the sum over the batch: a BatchNorm layer in training mode lets rows reach each other.
    """
    scale = FP16_SCALE if torch.float16 in {value.dtype for value in (logits, *features)} else 1.0
    chosen = logits.gather(1, classes[:, None]).sum() * scale
    gradients = torch.autograd.grad(chosen, tuple(features), retain_graph=create_graph, create_graph=create_graph)
    maps = []
    for gradient, feature in zip(gradients, features, strict=True):
        weight = wide(gradient).mean((2, 3), keepdim=True) / scale
        found = (weight * wide(feature)).sum(1)
        maps.append(found if create_graph else found.detach())
    return tuple(maps)


def msarc_loss(student: Maps, teacher: Maps) -> Tensor:
    """The loss above, a scalar, of the maps that both have; both have as many Grad-CAMs."""
    parts = []
    if student.cam is not None and teacher.cam is not None:
        mine, theirs = averaged_to_one_size(student.cam, teacher.cam)
        parts.append((mine - theirs).square().mean())
    for own, other in zip(student.grad_cams, teacher.grad_cams, strict=True):
        mine, theirs = averaged_to_one_size(own, other)
        area = mine.shape[-2] * mine.shape[-1]
        mine, theirs = mine * (_cells(own) / area), theirs * (_cells(other) / area)  # sums, not averages
        parts.append((mine - theirs).square().mean())
    return torch.stack(parts).sum()


def averaged_to_one_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both [..., h, w], h and w the smaller ones: cells of the larger map are averaged."""
    size = min(one.shape[-2], other.shape[-2]), min(one.shape[-1], other.shape[-1])
    first, second = (map if map.shape[-2:] == size else F.adaptive_avg_pool2d(map, size) for map in (one, other))
    return first, second


def _cells(value: Tensor) -> int:
    return value.shape[-2] * value.shape[-1]
