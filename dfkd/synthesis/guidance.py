"""The guidance gradient: teacher and decoder (and, on the `unet` path, the denoiser) differentiated for a latent.

    x = decode(z0hat)                                  images in 0..1, seen under a view of each where there are views
    L = sum over losses of weight times loss(x)        losses.py; views.py

Every loss is a per-image quantity and the gradient that of their sum, so an image's guidance does not depend on how
it was batched. A loss of a whole group enters by its slopes in the group's moments, held fixed: a group that fits one
call takes them from that call's own moments, one in several calls from a pass before. The sum is exact.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dfkd.errors import UsageError
from dfkd.synthesis.batching import cuts
from dfkd.synthesis.bn_statistics import FusedTeacher, Moments, averaged_over, record_bn_inputs
from dfkd.synthesis.losses import GuidanceLoss, Seen
from dfkd.synthesis.sampler import ToLatent
from dfkd.synthesis.views import seen
from dfkd.teachers import Classifier

Decode = Callable[[Tensor], Tensor]


def identity(z: Tensor) -> Tensor:
    return z


def pulled_back(images: Tensor, point: Tensor, gradient: Tensor, narrow: bool) -> Tensor:
    """dL/dpoint of dL/dimages, both [B, C, H, W], where image i follows from point i: the vector-Jacobian product.

    narrow: networks on the way compute in float16, which holds 6e-8 to 65 504. Each image's gradient then enters them
    times a power of two that brings its largest entry to 1..2, and is divided by it behind them: the sum of losses may
    have any size, and no image's gradient depends on another's.
    """
    if not narrow:
        return torch.autograd.grad(images, point, gradient)[0]
    largest = gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    power = torch.pow(2.0, -(largest.log() / math.log(2)).floor())  # of operations that every backend has
    return torch.autograd.grad(images, point, gradient * power)[0] / power


class Guidance:
    """The gradient of the summed guidance losses.

    Args:
        decode: latents [B, C, h, w] -> images [B, 3, H, W] in 0..1, differentiable; `identity` guides images.
        teacher: frozen, in evaluation mode.
        losses: at least one.
        student: needed where a loss needs "student".
        narrow: whether decoder or denoiser compute in float16, whose range `pulled_back` brings the gradient into.
        kernels: of the losses and, where moments are needed, of the teacher's BatchNorm layers: "torch" or "triton";
            results differ by rounding.
        fused: the same teacher's, where it is made already; otherwise made here for "triton".
        traced: whether a graph is made of it, which holds moments of every image alone, by plain operations.

    Raises:
        UsageError: moments asked of a teacher without BatchNorm layers, or that does not use each of them once; a
            student is needed and absent; two losses of one name.
    """

    def __init__(
        self,
        decode: Decode,
        teacher: Classifier,
        losses: Sequence[GuidanceLoss],
        student: Classifier | None = None,
        narrow: bool = False,
        kernels: str = "torch",
        fused: FusedTeacher | None = None,
        traced: bool = False,
    ) -> None:
        self.decode, self.teacher, self.student = decode, teacher, student
        self.losses, self.narrow, self.kernels = tuple(losses), narrow, kernels
        self.needs, self.traced = frozenset[str]().union(*(loss.needs for loss in losses)), traced
        of_moments = [loss.name for loss in losses if loss.needs & {"moments", "averages"}]
        self.layers = teacher.batch_norms() if of_moments else ()
        names = [loss.name for loss in losses]
        if of_moments and not self.layers:
            asking = ", ".join(of_moments)
            what = f"teacher {teacher.architecture} has no BatchNorm layer"
            raise UsageError(what, f"the guidance loss {asking} needs their statistics", "use --bn-weight 0")
        if len(set(names)) < len(names):
            raise UsageError(f"guidance losses {', '.join(names)}", "a name is there twice", "give one another name")
        if "student" in self.needs and student is None:
            raise UsageError("the adversarial loss has no student", "it is a student's disagreement", "give one")
        if fused is None and kernels == "triton" and self.layers:
            fused = FusedTeacher.of(teacher.module, self.layers)
        self.fused = fused if self.layers else None

    def with_(self, decode: Decode, losses: Sequence[GuidanceLoss] | None = None) -> "Guidance":
        """A guidance of this teacher and student with another decoder, and other losses where they are given."""
        narrow = self.narrow and decode is not identity  # the gradient of pixels passes no network of the prior
        own = (self.student, narrow, self.kernels, self.fused, self.traced)
        return Guidance(decode, self.teacher, self.losses if losses is None else losses, *own)

    @property
    def of_teachers(self) -> Sequence["Guidance"]:
        """The guidance by each teacher: itself, where it is by one."""
        return (self,)

    def judge(self, images: Tensor) -> tuple[Tensor, list[Moments]]:
        """Images [B, 3, H, W] in 0..1 -> the teacher's logits and, where needed, moments of every BatchNorm layer: of
        every image, or their averages, as `Seen.moments` has them."""
        if self.fused is not None:
            return self.fused(self.teacher.prepare(images))
        together = "moments" not in self.needs and not self.traced
        with record_bn_inputs(self.layers, together) as moments:
            logits = self.teacher.logits(images)
        return logits, moments

    def moments(self, latents: Tensor, view: Tensor | None = None) -> list[Moments]:
        """Moments as of `judge` for clean latents [B, C, h, w]; view as of `gradient`."""
        return self.judge(seen(self.decode(latents), view))[1]

    def values(self, images: Tensor, labels: Tensor, averages: Sequence[Moments] | None = None) -> dict[str, Tensor]:
        """The unweighted losses {name: [B]} of images [B, 3, H, W]; averages as of `of_call`."""
        found = self.seen(images, labels, averages)
        return {loss.name: loss(found) for loss in self.losses}

    def seen(self, images: Tensor, labels: Tensor, averages: Sequence[Moments] | None = None) -> Seen:
        """What the losses are functions of, for images [B, 3, H, W] of labels [B]; averages as of `of_call`."""
        logits, moments = self.judge(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        student = self.student.logits(images).to(logits) if self.student and "student" in self.needs else None
        return Seen(images, logits, labels, moments, self.layers, averages, student, self.kernels)

    def of_call(
        self,
        latents: Tensor,
        labels: Tensor,
        averages: Sequence[Moments] | None = None,
        to_latent: Decode = identity,
        view: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradient of one network call.

        latents: [B, C, h, w], a whole group (or images that do not interact); with `averages`, the moments [1, C] of
        every layer over a whole group, some of its images. view: as of `gradient`. Returns the gradient, like
        `latents`, and the unweighted losses {name: [B]}. Only tensor arithmetic, no branch on a value: compiled engines
        are traced from it.
        """
        leaf = latents.detach().requires_grad_()
        with torch.enable_grad():
            images = self.decode(to_latent(leaf))
            values = self.values(seen(images, view), labels, averages)
            total = torch.stack([loss.weight * values[loss.name] for loss in self.losses]).sum()
            (in_images,) = torch.autograd.grad(total, images)
            gradient = pulled_back(images, leaf, in_images, self.narrow)
        return gradient, {name: value.detach() for name, value in values.items()}

    def gradient(
        self,
        latents: Tensor,
        labels: Tensor,
        batch: int,
        to_latent: ToLatent | None = None,
        view: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradient of the summed loss in the latents of one whole group, or of images that do not interact.

        Args:
            latents: [G, C, h, w], the point at which to differentiate.
            labels: int64 [G].
            batch: images per network call; results do not depend on it but for rounding.
            to_latent: the denoiser's prediction on the `unet` path; None where the latents are clean.
            view: of `views.draw`, [G, ...]: how teacher and losses see each image; None: as it is.

        Returns:
            The gradient, like `latents`, and the unweighted losses {name: [G]} of the images as they were seen.
        """
        calls = list(cuts(len(latents), batch))
        images = torch.arange(len(latents), device=latents.device)

        def clean(cut: slice) -> Decode:
            return identity if to_latent is None else lambda z: to_latent(z, images[cut])

        views = [None if view is None else view[cut] for cut in calls]
        averages = None
        if len(calls) > 1 and "group" in self.needs and self.layers:
            with torch.no_grad():
                each = zip(calls, views, strict=True)
                moments = [self.moments(clean(cut)(latents[cut]), own) for cut, own in each]
            averages = averaged_over(moments, [len(latents[cut]) for cut in calls])
        each = zip(calls, views, strict=True)
        parts = [self.of_call(latents[cut], labels[cut], averages, clean(cut), own) for cut, own in each]
        if len(parts) == 1:
            return parts[0]
        gradients, records = zip(*parts, strict=True)
        return torch.cat(gradients), {name: torch.cat([record[name] for record in records]) for name in records[0]}
