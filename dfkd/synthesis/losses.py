"""Guidance losses as objects: a name, a weight, and a value for every image of what the teacher sees.

    L_cls = CE(T(x), y), or LSE(d t T(x)) - t T(x)_y with temperature t and discount d     EluCD, arXiv 2310.11311
    L_bn  = distance of the BatchNorm inputs' statistics from the running ones         bn_statistics.py
    L_adv = - 1{argmax S = argmax T} KL(softmax T || softmax S)                        T detached; or
            - entropy of softmax S; or - CE(S(x), y) + w CE(T(x), y)
    L_tv  = mean |difference of neighbouring pixels|
    L     = sum of weight times loss (DiffDFKD, arXiv 2504.00870)

One of your own is a file:

    # my.py, used as --loss my.py:Entropy(weight=0.1)
    @dataclass(frozen=True)
    class Entropy(GuidanceLoss):
        def __call__(self, seen: Seen) -> Tensor:
            return -(seen.logits.softmax(1) * seen.logits.log_softmax(1)).sum(1)

Its fields and its source enter the identity of the images and the key of engines by themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.config import ADV_LOSSES, GuidanceConfig
from dfkd.errors import UsageError
from dfkd.extension import make
from dfkd.synthesis.bn_statistics import Moments, averaged, bn_distance
from dfkd_kernels.soft_kl import soft_kl


@dataclass(frozen=True)
class Seen:
    """What a guidance loss is a function of, for the B images of one call.

    images: [B, 3, H, W] in 0..1, under the view of this gradient where there are views. logits: the teacher's [B, C],
        float32 at least. labels: int64 [B].
    moments: of the input of each of the teacher's BatchNorm `layers`, [B, C_l] of every image where a loss needs
        "moments", or else their averages over the call, [1, C_l] or as before, where one needs "averages", or ().
    averages: those of the whole group [1, C_l]; None where the images are the whole group.
    student_logits: [B, C]; None unless a loss needs "student". kernels: "torch" or "triton", which differ by rounding.
    """

    images: Tensor
    logits: Tensor
    labels: Tensor
    moments: Sequence[Moments] = ()
    layers: Sequence[nn.BatchNorm2d] = ()
    averages: Sequence[Moments] | None = None
    student_logits: Tensor | None = None
    kernels: str = "torch"

    def of_group(self, loss: Callable[[Sequence[Moments]], Tensor]) -> Tensor:
        """A loss of the whole group's moments, shared out to its images: [B].

        loss: moments averaged over the group, [1, C_l] a layer -> [1].
        Every image has the group's value, and the gradient of (group size x loss), so that guidance does not fade with
        the size of the group. The moments M being averages,  G dL/dx_i = sum_l <dL/dM_l, dm_li/dx_i>  with the slopes
        dL/dM of the whole group held fixed: exact for a group that is cut into several calls. Of averages over the B
        images of a call each image has the same product, whose sum over the images has the same gradient.
        """
        averages = averaged(self.moments) if self.averages is None else self.averages
        leaves = [Moments(m1.detach().requires_grad_(), m2.detach().requires_grad_()) for m1, m2 in averages]
        with torch.enable_grad():
            value = loss(leaves).sum()
            slopes = torch.autograd.grad(value, [m for leaf in leaves for m in leaf], materialize_grads=True)
        own = [moment for moments in self.moments for moment in moments]
        linear = own[0].new_zeros(own[0].shape[0])  # len() would fix the batch of a traced graph
        for moment, slope in zip(own, slopes, strict=True):
            linear = linear + (moment * slope.to(moment)).sum(1)
        return (value.detach() + (linear - linear.detach())).expand(self.logits.shape[0])


@dataclass(frozen=True)
class GuidanceLoss:
    """A guidance loss: called with what the teacher sees, it gives the unweighted loss [B] of every image.

    weight: its factor, >= 0. The class may set `name`, under which losses are recorded (the class's own in lower case
    otherwise), and `needs`, from "moments" (of the BatchNorm layers' inputs, of every image), "averages" (of these over
    images: quicker, and enough for `Seen.of_group`), "group" (it uses that, so that images of a group interact) and
    "student". Written in tensor operations without a branch on a value: compiled engines are traced from it. Raises
    ValueError for a negative weight.
    """

    weight: float

    name: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        cls.name = cls.__dict__.get("name") or cls.__name__.lower()

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"the weight of the loss {self.name} is {self.weight}; it must be >= 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def __call__(self, seen: Seen) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropy(GuidanceLoss):
    """L_cls = CE(T(x), y), as softplus(logsumexp of the other logits - the label's logit).

    Equal to log-softmax at the label, but each factor of its gradient is right in relative terms however sure the
    teacher is. There softmax - onehot is the difference of nearly equal numbers, and guidance of unit length would
    follow its rounding.

    temperature: factor of all logits t. discount: in 0..1, a factor more in the log-sum-exp, whose softmax is flatter
    then: logsumexp(d t logits) - t logit_y (EluCD, arXiv 2310.11311, which has t = 1, d = 0.5). Below 1 the gradient of
    a sure teacher does not fade, the loss has no least value, and 0 leaves the label's logit alone.
    Raises ValueError for values out of these ranges.
    """

    temperature: float = 1.0
    discount: float = 1.0

    name = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0 or not 0 <= self.discount <= 1:
            found = f"temperature {self.temperature}, discount {self.discount}"
            raise ValueError(f"{found} of the loss {self.name}: want a temperature above 0, a discount in 0..1")

    def __call__(self, seen: Seen) -> Tensor:
        logits = seen.logits * self.temperature
        if self.discount == 1:
            return cross_entropy(logits, seen.labels)
        own = logits.masked_fill(~_at(seen.labels, logits), 0).sum(1)
        return (self.discount * logits).logsumexp(1) - own


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """CE [B] of logits [B, C] and labels int64 [B], in the form that `CrossEntropy` explains."""
    own = _at(labels, logits)
    others = logits.masked_fill(own, -torch.inf).logsumexp(1)
    return F.softplus(others - logits.masked_fill(~own, 0).sum(1), threshold=40)  # linear above, exactly


def _at(labels: Tensor, logits: Tensor) -> Tensor:
    """bool [B, C]: where each image's label is."""
    return labels[:, None] == torch.arange(logits.shape[1], device=logits.device)


@dataclass(frozen=True)
class BatchNormLoss(GuidanceLoss):
    """L_bn, the distance of BatchNorm statistics from the teacher's running ones.

    stats: "image" for every image's own statistics, "group" for those of its whole group (DeepInversion's reading,
    arXiv 1912.08795). distance: "norm" or "relative" (`bn_statistics.bn_distance`). Raises ValueError for others.
    """

    stats: str = "group"
    distance: str = "norm"

    name = "bn"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, value, known in (
            ("stats", self.stats, ("image", "group")),
            ("distance", self.distance, ("norm", "relative")),
        ):
            if value not in known:
                raise ValueError(f"{field} of the loss bn is {value!r}; it must be one of {', '.join(known)}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"averages", "group"} if self.stats == "group" else {"moments"})

    def __call__(self, seen: Seen) -> Tensor:
        if self.stats == "group":
            return seen.of_group(lambda averages: bn_distance(averages, seen.layers, self.distance))
        return bn_distance(seen.moments, seen.layers, self.distance)


@dataclass(frozen=True)
class Adversarial(GuidanceLoss):
    """L_adv, minus what the student has to learn on an image; guidance raises that.

    kind: "kl", the divergence from the teacher, which is held fixed, where both agree on the class (DiffDFKD, arXiv
    2504.00870); "entropy", of the student's answer: images that it is unsure of; "reference", the student's
    cross-entropy less `reference` times the teacher's: learnable, not wrong (arXiv 2206.07137 chooses samples by it).
    clamp: above 0, the value past which an image gets no more gradient of this loss, so that it cannot run away.
    Raises ValueError for another kind and for negative numbers.
    """

    kind: str = "kl"
    reference: float = 1.0
    clamp: float = 0.0

    name = "adv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ADV_LOSSES:
            raise ValueError(f"kind of the loss adv is {self.kind!r}; it must be one of {', '.join(ADV_LOSSES)}")
        if min(self.reference, self.clamp) < 0:
            raise ValueError(f"reference {self.reference}, clamp {self.clamp} of the loss adv: they must be >= 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"student"})

    def __call__(self, seen: Seen) -> Tensor:
        found = self._to_learn(seen)
        return -(found.clamp_max(self.clamp) if self.clamp else found)

    def _to_learn(self, seen: Seen) -> Tensor:
        assert seen.student_logits is not None
        teacher, student = seen.logits.detach(), seen.student_logits
        if self.kind == "reference":
            return cross_entropy(student, seen.labels) - self.reference * cross_entropy(seen.logits, seen.labels)
        if self.kind == "entropy":
            log = student.log_softmax(1)
            return -(log.exp() * log).sum(1)
        if seen.kernels == "triton":
            return soft_kl(student, teacher, agreeing=True)
        agree = (teacher.argmax(1) == student.argmax(1)).to(student.dtype)
        divergence = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True)
        return agree * divergence.sum(1)


@dataclass(frozen=True)
class TotalVariation(GuidanceLoss):
    """Mean absolute difference of neighbouring pixels, down and across."""

    name = "tv"

    def __call__(self, seen: Seen) -> Tensor:
        return sum((seen.images.diff(dim=d).abs().mean((1, 2, 3)) for d in (2, 3)), seen.logits.new_zeros(()))


def losses_of(config: GuidanceConfig) -> tuple[GuidanceLoss, ...]:
    """The losses of weight above 0 that the settings name: cls, bn, adv, tv, then those of the user's own files.

    Raises UsageError: an object that is no GuidanceLoss, or that cannot be made.
    """
    built_in = (
        CrossEntropy(config.cls_weight, config.joint_temperature, config.margin_discount),
        BatchNormLoss(config.bn_weight, config.bn_stats, config.bn_loss),
        Adversarial(config.adv_weight, config.adv_loss, config.adv_reference, config.adv_clamp),
        TotalVariation(config.tv_weight),
    )
    own = tuple(make(text, {}, "guidance loss") for text in config.losses)
    for loss, text in zip(own, config.losses, strict=True):
        if not isinstance(loss, GuidanceLoss):
            why = f"it is a {type(loss).__name__}"
            raise UsageError(f"{text} is no guidance loss", why, "derive it from dfkd.synthesis.losses.GuidanceLoss")
    return tuple(loss for loss in (*built_in, *own) if loss.weight > 0)
