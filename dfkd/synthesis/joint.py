"""Joint guidance: each image by all the teachers that know its class, weighted.

    x_i = decode(z_i)
    g_i = sum_k s_ki dL_k/dx_i        over the members k that know y_i; s of Committee.shares
    dL/dz = (d decode/dz)^T g         once for all members

L_k are the losses of member k on the images of the group whose classes it knows, with its own BatchNorm statistics over
exactly these; the adversarial loss compares it with the student's answers about its classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfkd.synthesis.batching import cuts
from dfkd.synthesis.bn_statistics import Moments, averaged_over
from dfkd.synthesis.guidance import Decode, Guidance, identity, pulled_back
from dfkd.synthesis.losses import GuidanceLoss
from dfkd.synthesis.sampler import ToLatent
from dfkd.synthesis.softplus import softened
from dfkd.synthesis.views import seen as viewed
from dfkd.teachers import Classifier
from dfkd.teachers.committee import Committee, Member

Averages = list[Moments] | None


class JointGuidance(Guidance):
    """Guidance by the members of a committee. Arguments and errors as of Guidance, of each member.

    engines: by function name, of which `decode_vjp` and the decoder named `decoding` are used where they are.
    """

    def __init__(
        self,
        decode: Decode,
        teacher: Committee,
        losses: Sequence[GuidanceLoss],
        student: Classifier | None = None,
        narrow: bool = False,
        kernels: str = "torch",
        softplus_beta: float = 0.0,
    ) -> None:
        self.decode, self.teacher, self.student = decode, teacher, student
        self.losses, self.narrow, self.kernels = tuple(losses), narrow, kernels
        self.layers, self.fused, self.beta = (), None, softplus_beta
        self.committee, self.engines, self.decoding = teacher, dict[str, Callable[..., Any]](), "decode"
        self.members = [
            Guidance(
                identity, softened(member.classifier, softplus_beta), losses, about(student, member), False, kernels
            )
            for member in teacher.members
        ]
        self.needs = self.members[0].needs

    def with_(self, decode: Decode, losses: Sequence[GuidanceLoss] | None = None) -> "JointGuidance":
        narrow = self.narrow and decode is not identity
        own = (self.student, narrow, self.kernels, self.beta)
        return JointGuidance(decode, self.committee, self.losses if losses is None else losses, *own)

    @property
    def of_teachers(self) -> Sequence[Guidance]:
        return self.members

    def by(self, engines: Mapping[str, Callable[..., Any]], decoding: str) -> "JointGuidance":
        """This guidance, with engines from now on in the place of the decoder and of its vector-Jacobian product."""
        self.engines, self.decoding = dict(engines), decoding
        return self

    def gradient(
        self,
        latents: Tensor,
        labels: Tensor,
        batch: int,
        to_latent: ToLatent | None = None,
        view: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        calls, images = list(cuts(len(latents), batch)), torch.arange(len(latents), device=latents.device)

        def clean(cut: slice) -> Decode:
            return identity if to_latent is None else lambda z: to_latent(z, images[cut])

        averages: list[Averages] = [None] * len(self.members)
        if len(calls) > 1 and "group" in self.needs:
            with torch.no_grad():
                shown = [viewed(self._decoded(clean(cut)(latents[cut])), _part(view, cut)) for cut in calls]
                averages = self._averages(torch.cat(shown), labels, batch)
        parts = [self._of_call(latents[cut], labels[cut], averages, clean(cut), _part(view, cut)) for cut in calls]
        gradients, records = zip(*parts, strict=True)
        return torch.cat(gradients), {name: torch.cat([record[name] for record in records]) for name in records[0]}

    def _of_call(
        self, latents: Tensor, labels: Tensor, averages: Sequence[Averages], to_latent: Decode, view: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        pull = self.engines.get("decode_vjp") if to_latent is identity and self.decode is not identity else None
        if pull is not None:
            in_images, values = self.in_images(self._decoded(latents), labels, averages, view)
            return pull(latents, in_images)[0], values
        leaf = latents.detach().requires_grad_()
        with torch.enable_grad():
            images = self.decode(to_latent(leaf))
        in_images, values = self.in_images(images.detach(), labels, averages, view)
        return pulled_back(images, leaf, in_images, self.narrow), values

    def in_images(
        self, images: Tensor, labels: Tensor, averages: Sequence[Averages], view: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """g [B, 3, H, W] in images, and the losses {name: [B]} weighted over the members.

        averages: of each member over its images of the whole group; None where these are all of them.
        """
        total, shares = torch.zeros_like(images), self.committee.shares(labels).to(images)
        values = {loss.name: total.new_zeros(len(images)) for loss in self.losses}
        for member, guidance, known, share in zip(self.committee.members, self.members, averages, shares, strict=True):
            rows = share.nonzero()[:, 0]
            if not len(rows):
                continue
            own = member.own(labels)[rows]
            gradient, found = guidance.of_call(images[rows], own, known, view=None if view is None else view[rows])
            total = total.index_add(0, rows, share[rows].view(-1, 1, 1, 1) * gradient)
            values = {
                name: value.index_add(0, rows, share[rows] * found[name].to(value)) for name, value in values.items()
            }
        return total, values

    def _averages(self, images: Tensor, labels: Tensor, batch: int) -> list[Averages]:
        """Every member's moments over its images of a whole group, as they are seen [G, 3, H, W]."""
        found: list[Averages] = []
        for member, guidance in zip(self.committee.members, self.members, strict=True):
            rows = (member.own(labels) >= 0).nonzero()[:, 0]
            parts = [images[rows[cut]] for cut in cuts(len(rows), batch)]
            moments = [guidance.judge(part)[1] for part in parts]
            found.append(averaged_over(moments, list(map(len, parts))) if parts else None)
        return found

    def _decoded(self, latents: Tensor) -> Tensor:
        engine = self.engines.get(self.decoding) if self.decode is not identity else None
        images: Tensor = self.decode(latents) if engine is None else engine(latents)[0]
        return images


class Chosen(nn.Module):
    """A network's answers about some of its classes: images [B, 3, H, W] -> logits [B, len(classes)]."""

    def __init__(self, network: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        self.network, self.classes = network, list(classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)[:, self.classes]
        return logits


def about(student: Classifier | None, member: Member) -> Classifier | None:
    """The student as a classifier of a member's classes alone; None where there is none."""
    if student is None:
        return None
    module = Chosen(student.module, member.classes)
    return student.replace(module=module, class_names=member.classifier.class_names)


def guide_by(
    decode: Decode,
    teacher: Classifier,
    losses: Sequence[GuidanceLoss],
    student: Classifier | None = None,
    narrow: bool = False,
    kernels: str = "torch",
    softplus_beta: float = 0.0,
) -> Guidance:
    """The guidance of one teacher, or of several. Arguments and errors as of Guidance."""
    if isinstance(teacher, Committee):
        return JointGuidance(decode, teacher, losses, student, narrow, kernels, softplus_beta)
    return Guidance(decode, softened(teacher, softplus_beta), losses, student, narrow, kernels)


def _part(view: Tensor | None, cut: slice) -> Tensor | None:
    return None if view is None else view[cut]
