"""The guidance gradient: teacher and decoder (and, on the `unet` path, the denoiser) differentiated for a latent.

    x     = decode(z0hat)                                          images in 0..1
    L_bn  = BN statistics of the teacher's features                statistics.py
    L_cls = CE(T(x), y)
    L_adv = - 1{argmax S = argmax T} KL(softmax T || softmax S)    T detached
    L     = bn_weight L_bn + cls_weight L_cls + adv_weight L_adv   (DiffDFKD, arXiv 2504.00870)

Every loss is a per-image quantity and the gradient that of their sum, so an image's guidance does not depend on how
it was batched. L_bn of a group enters by its slopes in the group's moments, held fixed: a group that fits one network
call takes them from that call's own moments, one in several micro-batches from a pass before. The sum is exact, and
both ways do the same arithmetic, so that they agree to the last bit where the networks' rows do. Guidance of unit
length amplifies a rounding error a hundred thousand times in a few dozen steps; "nearly the same" would not stay so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd.config import BN_LOSSES
from dfkd.synthesis.microbatch import cuts
from dfkd.synthesis.statistics import GroupLoss, Moments, bn_loss, joined, tapped
from dfkd.synthesis.taps import Taps
from dfkd.teachers.classifier import Classifier
from dfkd_engine.networks import Prior
from dfkd_kernels.rows import NetworkInput
from dfkd_kernels.soft_kl import soft_kl

Decode = Callable[[Tensor], Tensor]


class ToLatent(Protocol):
    """Points at which a gradient is taken [B, C, h, w], the latents of group rows `rows` [B] -> clean latents z0hat."""

    def __call__(self, z: Tensor, rows: Tensor) -> Tensor: ...


def identity(z: Tensor) -> Tensor:
    return z


@dataclass(frozen=True)
class LossWeights:
    """Weights of the guidance losses and how L_bn is taken.

    bn, cls, adv   weights >= 0; a loss of weight 0 is not computed
    bn_stats       "image": every image's own statistics; "group": those of the whole group
    bn_loss        "norm" or "relative" (statistics.bn_loss)
    """

    bn: float
    cls: float
    adv: float = 0.0
    bn_stats: str = "group"
    bn_loss: str = "norm"

    def __post_init__(self) -> None:
        if min(self.bn, self.cls, self.adv) < 0:
            raise ValueError(f"loss weights must be >= 0, got bn {self.bn}, cls {self.cls}, adv {self.adv}")
        if self.bn_stats not in ("image", "group"):
            raise ValueError(f"bn_stats must be image or group, got {self.bn_stats!r}")
        if self.bn_loss not in BN_LOSSES:
            raise ValueError(f"bn_loss must be one of {', '.join(BN_LOSSES)}, got {self.bn_loss!r}")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """CE [B] of logits [B, C] and labels int64 [B], as softplus(logsumexp of the other logits - the label's logit).

    Equal to log-softmax at the label, but each factor of its gradient is right in relative terms however sure the
    teacher is. There softmax - onehot is the difference of nearly equal numbers, and guidance of unit length would
    follow its rounding.
    """
    own = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
    others = logits.masked_fill(own, -torch.inf).logsumexp(1)
    return F.softplus(others - logits.masked_fill(~own, 0).sum(1), threshold=40)  # linear above: exact to 1e-17


def adversarial_loss(teacher: Tensor, student: Tensor, kernels: str = "torch") -> Tensor:
    """L_adv [B] of logits [B, C]: high where teacher and student agree on the class and on the distribution.

    kernels: "torch", or "triton" for one launch that makes the gradient too.
    """
    teacher = teacher.detach()
    if kernels == "triton":
        return -soft_kl(student, teacher, agreeing=True)
    agree = (teacher.argmax(1) == student.argmax(1)).to(student.dtype)
    divergence = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True).sum(1)
    return -agree * divergence


class Guidance:
    """The gradient of the guidance loss for a group of latents.

    Args:
        decode: latents [B, C, h, w] -> images [B, 3, H, W] in 0..1, differentiable.
        teacher: in eval mode, frozen.
        weights: weights of the losses.
        student: needed where weights.adv > 0.
        loss_scale: the loss is multiplied by it before the backward pass and the gradient divided after (float16).
        loss_dtype: of the losses of logits, as far as the logits are not wider. In float32 the exponential of a value
            differs in the last bit with its place in a tensor (vector loops and their remainders), and so an image's
            gradient with what it was batched with; float64 rounds that away at no cost.
        kernels: what computes L_adv and, where L_bn is asked for, the teacher's BatchNorm layers: "torch" or "triton";
            results differ by rounding.
        taps: of the same teacher, where they are made already; otherwise they are made here for "triton".

    Raises:
        ValueError: L_bn asked of a teacher without BatchNorm layers, or that does not use each of them once; L_adv
            without a student.
    """

    def __init__(
        self,
        decode: Decode,
        teacher: Classifier,
        weights: LossWeights,
        student: Classifier | None = None,
        loss_scale: float = 1.0,
        loss_dtype: torch.dtype = torch.float64,
        kernels: str = "torch",
        taps: Taps | None = None,
    ) -> None:
        self.decode, self.teacher, self.student = decode, teacher, student
        self.weights, self.loss_scale, self.loss_dtype, self.kernels = weights, loss_scale, loss_dtype, kernels
        # What `gradient` takes, and what its gradients are still to be divided by: see at_decoder.
        self.takes, self.unit = NetworkInput(), 1.0
        self.layers = teacher.batch_norms() if weights.bn else ()
        if weights.bn and not self.layers:
            raise ValueError(f"teacher {teacher.architecture} has no BatchNorm layer, so L_bn needs weight 0")
        if weights.adv and student is None:
            raise ValueError("L_adv (adv weight > 0) needs a student")
        if kernels == "triton" and self.layers and taps is None:
            taps = Taps.of(teacher.module, self.layers)
        self.taps = taps if self.layers else None

    def taught(self, images: Tensor) -> tuple[Tensor, list[Moments]]:
        """Images [B, 3, H, W] in 0..1 -> the teacher's logits and, where L_bn is asked for, moments of every layer."""
        if self.taps is not None:
            return self.taps(self.teacher.prepare(images))
        with tapped(self.layers) as moments:
            logits = self.teacher.logits(images)
        return logits, moments

    def _moments(self, z0: Tensor) -> list[Moments]:
        return self.taught(self.decode(z0))[1]

    def _group_loss(self, latents: Tensor, to_latent: ToLatent | None, micro: int) -> GroupLoss:
        """Phase one: the whole group's statistics, without a gradient."""
        parts = []
        with torch.no_grad():
            for rows, count in cuts(len(latents), micro, latents.device):
                z0 = to_latent(latents[rows], rows) if to_latent else latents[rows]
                parts.append([Moments(m.m1[:count], m.m2[:count]) for m in self._moments(z0)])
        return GroupLoss.of(joined(parts), self.layers, self.weights.bn_loss)

    def _losses(self, z0: Tensor, labels: Tensor, group: GroupLoss | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to differentiate [B] and the losses to record, each [B]. A group's loss is every image's.

        group: the group's slopes where these are some of its images; None where they are all of it.
        """
        w = self.weights
        images = self.decode(z0)
        logits, moments = self.taught(images)
        narrow = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.to(torch.promote_types(logits.dtype, self.loss_dtype))
        total = logits.new_zeros(logits.shape[0])
        record: dict[str, Tensor] = {}
        if w.cls:
            record["cls"] = cross_entropy(logits, labels)
            total = total + w.cls * record["cls"]
        if w.bn and w.bn_stats == "image":
            record["bn"] = bn_loss(moments, self.layers, w.bn_loss)
            total = total + w.bn * record["bn"]
        elif w.bn:
            group = group or GroupLoss.of(moments, self.layers, w.bn_loss)
            record["bn"] = group.value.expand(logits.shape[0])
            total = total + w.bn * group.surrogate(moments)
        if w.adv:
            assert self.student is not None
            record["adv"] = adversarial_loss(logits, self.student.logits(images).to(logits), self.kernels)
            total = total + w.adv * record["adv"]
        return total, {name: value.detach().to(narrow) for name, value in record.items()}

    def of_batch(
        self, latents: Tensor, labels: Tensor, group: GroupLoss | None = None, to_latent: Decode = identity
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradient of one network call: `latents` [B, C, h, w] are a whole group, or some of the group that `group` is.

        Returns the gradient, like `latents`, and the unweighted losses {name: [B]}. Only tensor arithmetic, no branch
        on a value: this is what compiled engines are traced from.
        """
        leaf = latents.detach().requires_grad_()
        with torch.enable_grad():
            total, record = self._losses(to_latent(leaf), labels, group)
            (gradient,) = torch.autograd.grad(total.sum() * self.loss_scale, leaf)
        return gradient / self.loss_scale if self.unit == 1 else gradient, record

    def at_decoder(self, prior: Prior) -> "Guidance":
        """The same losses differentiated for the decoder's own input, in its dtype, as `takes` says.

        Whoever uses the gradient divides it by `unit`, in float32: in half precision it would vanish.
        """
        own = (self.teacher, self.weights, self.student, self.loss_scale, self.loss_dtype, self.kernels, self.taps)
        made = Guidance(prior.decode_input, *own)
        made.takes, made.unit = prior.decoder_input, self.loss_scale * prior.scaling_factor
        return made

    def on_pixels(self) -> "Guidance":
        """The same losses with images [B, 3, H, W] in 0..1 in the place of latents."""
        own = (self.teacher, self.weights, self.student)
        return Guidance(identity, *own, loss_dtype=self.loss_dtype, kernels=self.kernels, taps=self.taps)

    def statistics_alone(self) -> "Guidance":
        """The same with L_bn alone, of weight 1."""
        weights = LossWeights(bn=1.0, cls=0.0, bn_stats=self.weights.bn_stats, bn_loss=self.weights.bn_loss)
        own = (self.loss_scale, self.loss_dtype, self.kernels, self.taps)
        return Guidance(self.decode, self.teacher, weights, None, *own)

    def gradient(
        self, latents: Tensor, labels: Tensor, micro: int, to_latent: ToLatent | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradient of the summed loss in the latents of one whole group.

        Args:
            latents: [G, C, h, w], the point at which to differentiate.
            labels: int64 [G].
            micro: rows per network call; results do not depend on it but for rounding.
            to_latent: (latents [B, ...], row indices [B]) -> clean latents z0hat [B, ...], the denoiser's prediction on
                the `unet` path; None where the latents are clean, on the `latent` path.

        Returns:
            The gradient, like `latents`, and the unweighted losses {name: [G]} of the images as they were.
        """
        in_group = bool(self.weights.bn) and self.weights.bn_stats == "group"
        cut = len(latents) > micro
        if not cut:
            every = torch.arange(len(latents), device=latents.device)
            return self.of_batch(latents, labels, None, partial(to_latent, rows=every) if to_latent else identity)
        group = self._group_loss(latents, to_latent, micro) if in_group else None
        gradients, records = [], []
        for rows, count in cuts(len(latents), micro, latents.device):
            way = partial(to_latent, rows=rows) if to_latent else identity
            gradient, record = self.of_batch(latents[rows], labels[rows], group, way)
            gradients.append(gradient[:count])
            records.append({name: value[:count] for name, value in record.items()})
        return torch.cat(gradients), {name: torch.cat([r[name] for r in records]) for name in records[0]}
