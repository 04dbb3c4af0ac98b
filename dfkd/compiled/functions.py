"""The functions that become engines: tensors in, tensors out, for one prior, teacher and set of losses.

    unet            (z [B,C,h,w], t, context [B,L,D])         -> prediction [B,C,h,w], all but t in the networks' dtype
    decode          (z0 [B,C,h,w])                             -> image [B,3,H,W] in 0..1
    gradient        (z0, labels [B])                           -> gradient [B,C,h,w], losses [B]; z0 is a whole group,
                                                                  or every image has its own statistics
    pixel_gradient  (image, labels)                            -> the same in the image
    image_moments   (image)                                    -> m1, m2 [B,K] of the BN layers' inputs, side by side
    image_gradient  (image, labels, slope1 [K], slope2 [K])    -> gradient in the image, losses; some of a group
    decode_vjp      (z0, image_gradient [B,3,H,W])             -> gradient [B,C,h,w]

The last three and `decode` are the split form, for a group in several micro-batches and for losses of a network whose
weights change: (dL/dz0) = (d decode/dz0)^T dL/dx, with dL/dx taken where x is. The chain rule is exact.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dfkd.synthesis.guidance import Guidance, LossWeights
from dfkd.synthesis.statistics import GroupLoss, Moments
from dfkd.teachers.classifier import Classifier
from dfkd_engine.attention import set_attention
from dfkd_engine.group_norms import set_group_norms
from dfkd_engine.networks import Prior
from dfkd_engine.spec import TensorSpec

FORWARD = ("unet", "decode", "image_moments")
GRADIENT = ("gradient", "pixel_gradient", "image_gradient", "decode_vjp")
NETWORKS = ("unet", "decode", "gradient", "pixel_gradient", "image_moments", "image_gradient", "decode_vjp")
OF_TEACHER = ("gradient", "pixel_gradient", "image_moments", "image_gradient")
OF_DECODER = ("decode", "gradient", "decode_vjp")


@dataclass(frozen=True)
class Sources:
    """What the functions are made of.

    latent_size: (h, w). weights: of the losses; None where nothing guides. kernels: of the guidance, "torch" or, where
    it runs eagerly, "triton": no graph holds such an operation.
    """

    prior: Prior
    teacher: Classifier | None
    weights: LossWeights | None
    latent_size: tuple[int, int]
    loss_scale: float = 1.0
    kernels: str = "torch"

    def doubled(self) -> "Sources":
        """The same in float64: what compiled and eager results are judged by."""
        networks = {name: _double(getattr(self.prior, name)) for name in ("unet", "vae")}
        for network in networks.values():
            set_attention(network, "sdpa")  # xformers has no float64
            set_group_norms(network, "torch")
        prior = replace(self.prior, **networks)
        teacher = self.teacher and replace(self.teacher, module=_double(self.teacher.module))
        return replace(self, prior=prior, teacher=teacher, loss_scale=1.0)

    def guidance(self) -> Guidance:
        """Without L_adv, whose network changes, and with float32 losses, which every backend has."""
        assert self.teacher is not None and self.weights is not None
        weights = replace(self.weights, adv=0.0)
        own = (self.loss_scale, torch.float32, self.kernels)
        return Guidance(self.prior.decode, self.teacher, weights, None, *own)


@dataclass(frozen=True)
class Function:
    """One function with what a compiler and a judge have to know of it.

    call     the function, on eager networks
    inputs   of the call; outputs: their names, in order
    kind     "forward" or "gradient": which tolerance judges it
    """

    call: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    kind: str


def function(network: str, sources: Sources) -> Function:
    """The function of one of NETWORKS."""
    call, inputs, outputs = _MAKERS[network](sources)
    return Function(call, inputs, outputs, "forward" if network in FORWARD else "gradient")


def losses_recorded(weights: LossWeights) -> tuple[str, ...]:
    """Names of the losses that a gradient returns, in their order; L_adv is never inside an engine."""
    return tuple(name for name, weight in (("cls", weights.cls), ("bn", weights.bn)) if weight)


def samples(network: str, sources: Sources, rows: int, seed: int) -> tuple[Tensor, ...]:
    """Inputs [rows, ...] such as a run has: latents of unit variance, images that the decoder draws, labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    device = sources.prior.device
    z = torch.randn(rows, sources.prior.latent_channels, *sources.latent_size, generator=generator).to(device)
    if network == "unet":
        dtype = getattr(torch, _network_dtype(sources.prior))
        context = sources.prior.encode_prompts(["a photo", ""])[torch.arange(rows) % 2]
        return z.to(dtype), torch.tensor([500.0], device=device), context.to(dtype)
    if network in ("decode",):
        return (z,)
    with torch.no_grad():
        images = sources.prior.decode(z)
    noise = torch.randn(images.shape, generator=generator).to(device)
    if network == "decode_vjp":
        return z, noise
    # A decoder draws its first guess smooth; some noise makes the teacher's layers see all their range.
    images = (images + 0.1 * noise).clamp(0, 1)
    if network == "image_moments":
        return (images,)
    assert sources.teacher is not None
    labels = (torch.arange(rows) % len(sources.teacher.class_names)).to(device)
    if network == "gradient":
        return z, labels
    if network == "pixel_gradient":
        return images, labels
    width = channels(sources.teacher)
    slopes = torch.randn(2, width, generator=generator).to(device) / width
    return images, labels, slopes[0], slopes[1]


def channels(teacher: Classifier) -> int:
    """K, the channels of all BatchNorm layers together."""
    return sum(_widths(teacher.batch_norms()))


def _widths(layers: Sequence[nn.BatchNorm2d]) -> list[int]:
    return [layer.running_mean.numel() for layer in layers if layer.running_mean is not None]


def _network_dtype(prior: Prior) -> str:
    """What the UNet takes and gives without a conversion: the launches of a guided step write it."""
    return str(torch.float32 if prior.dtype == torch.float64 else prior.dtype).removeprefix("torch.")


def _latents(sources: Sources) -> TensorSpec:
    return TensorSpec("z0", (None, sources.prior.latent_channels, *sources.latent_size), "float32")


def _images(sources: Sources, name: str = "image") -> TensorSpec:
    side = [sources.prior.vae_scale_factor * n for n in sources.latent_size]
    return TensorSpec(name, (None, 3, *side), "float32")


_LABELS = TensorSpec("labels", (None,), "int64")
_Made = tuple[Callable[..., tuple[Tensor, ...]], tuple[TensorSpec, ...], tuple[str, ...]]


def _unet(s: Sources) -> _Made:
    width, length = s.prior.encode_prompts([""]).shape[2], s.prior.encode_prompts([""]).shape[1]
    dtype = _network_dtype(s.prior)
    z = replace(_latents(s), name="z", dtype=dtype)
    inputs = (z, TensorSpec("t", (1,), "float32"), TensorSpec("context", (None, length, width), dtype))

    def unet(z: Tensor, t: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        return (s.prior.denoise(z, t, context),)

    return unet, inputs, ("prediction",)


def _decode(s: Sources) -> _Made:
    return lambda z0: (s.prior.decode(z0),), (_latents(s),), ("image",)


def _decode_vjp(s: Sources) -> _Made:
    def decode_vjp(z0: Tensor, image_gradient: Tensor) -> tuple[Tensor, ...]:
        leaf = z0.detach().requires_grad_()
        with torch.enable_grad():
            # the loss scale keeps small gradients in float16's range on their way through the decoder
            scaled = (s.prior.decode(leaf) * (image_gradient * s.loss_scale)).sum()
            (gradient,) = torch.autograd.grad(scaled, leaf)
        return (gradient / s.loss_scale,)

    return decode_vjp, (_latents(s), _images(s, "image_gradient")), ("gradient",)


def _whole(s: Sources, guidance: Guidance, point: TensorSpec) -> _Made:
    def gradient(point: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        found, losses = guidance.of_batch(point, labels)
        return found, *losses.values()

    return gradient, (point, _LABELS), ("gradient", *losses_recorded(guidance.weights))


def _gradient(s: Sources) -> _Made:
    return _whole(s, s.guidance(), _latents(s))


def _pixel_gradient(s: Sources) -> _Made:
    return _whole(s, s.guidance().on_pixels(), _images(s))


def _image_moments(s: Sources) -> _Made:
    assert s.teacher is not None
    weights = LossWeights(bn=1.0, cls=0.0)  # whatever the run's are, these moments are of every layer
    guidance = Guidance(s.prior.decode, s.teacher, weights, kernels=s.kernels)

    def image_moments(image: Tensor) -> tuple[Tensor, ...]:
        return side_by_side(guidance.taught(image)[1])

    return image_moments, (_images(s),), ("m1", "m2")


def _image_gradient(s: Sources) -> _Made:
    assert s.teacher is not None
    guidance = s.guidance().on_pixels()
    slope = TensorSpec("slope1", (channels(s.teacher),), "float32")
    names = losses_recorded(guidance.weights)

    def image_gradient(image: Tensor, labels: Tensor, slope1: Tensor, slope2: Tensor) -> tuple[Tensor, ...]:
        # the group's value is the caller's: only its slopes have a part in the gradient
        group = GroupLoss(slope1.new_zeros(()), one_by_one(guidance.layers, slope1[None], slope2[None]))
        found, losses = guidance.of_batch(image, labels, group)
        return found, *(losses[name] for name in names if name != "bn")

    inputs = (_images(s), _LABELS, slope, replace(slope, name="slope2"))
    return image_gradient, inputs, ("gradient", *(name for name in names if name != "bn"))


_MAKERS: dict[str, Callable[[Sources], _Made]] = {
    "unet": _unet,
    "decode": _decode,
    "decode_vjp": _decode_vjp,
    "gradient": _gradient,
    "pixel_gradient": _pixel_gradient,
    "image_moments": _image_moments,
    "image_gradient": _image_gradient,
}


def side_by_side(moments: Sequence[Moments]) -> tuple[Tensor, Tensor]:
    """Moments of every layer [B, C_l] -> two tensors [B, K]."""
    return torch.cat([m.m1 for m in moments], 1), torch.cat([m.m2 for m in moments], 1)


def one_by_one(layers: Sequence[nn.BatchNorm2d], m1: Tensor, m2: Tensor) -> list[Moments]:
    """The way back: [B, K] twice -> moments of every layer [B, C_l]."""
    sizes = _widths(layers)
    return [Moments(a, b) for a, b in zip(torch.split(m1, sizes, 1), torch.split(m2, sizes, 1), strict=True)]


def _double(network: Any) -> Any:
    return copy.deepcopy(network).double()
