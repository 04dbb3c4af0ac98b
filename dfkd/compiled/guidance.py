"""Prior and guidance whose networks are compiled engines: the same surface, so the sampler does not know."""

from collections.abc import Callable, Mapping
from dataclasses import fields

import torch
from torch import Tensor

from dfkd.compiled.functions import losses_recorded, one_by_one, side_by_side
from dfkd.synthesis.guidance import Decode, Guidance, identity
from dfkd.synthesis.statistics import GroupLoss, Moments
from dfkd_engine.networks import Prior
from dfkd_kernels.rows import NetworkInput

Call = Callable[..., tuple[Tensor, ...]]


class CompiledPrior(Prior):
    """A prior that denoises and decodes by engines, where there are some; without gradients to their inputs."""

    engines: Mapping[str, Call]

    @staticmethod
    def of(prior: Prior, engines: Mapping[str, Call]) -> "CompiledPrior":
        compiled = CompiledPrior(**{field.name: getattr(prior, field.name) for field in fields(Prior)})
        object.__setattr__(compiled, "engines", engines)
        return compiled

    def denoise(self, z: Tensor, t: Tensor | float, context: Tensor) -> Tensor:
        if "unet" not in self.engines:
            return super().denoise(z, t, context)
        time = torch.as_tensor(t, dtype=torch.float32, device=z.device).reshape(1)
        return self.engines["unet"](z.to(self.dtype), time, context.to(self.dtype))[0].to(z.dtype)

    @property
    def unet_input(self) -> NetworkInput:
        """An engine takes plain tensors in the networks' dtype: a step's launch writes its rows as they are bound."""
        return NetworkInput(self.dtype) if "unet" in self.engines else super().unet_input

    def decode(self, z0: Tensor) -> Tensor:
        if "decode" not in self.engines:
            return super().decode(z0)
        return self.engines["decode"](z0)[0]


class CompiledGuidance(Guidance):
    """Guidance by engines, each network that has none by autograd.

    A group in one network call, and images with statistics of their own, take the fused gradient. A group in several
    takes the split form: decode, moments, the image's gradient with the group's slopes held, then the decoder's
    vector-Jacobian product. So does L_adv, whose image gradient stays with autograd.

    Args:
        guidance: what is computed, by autograd.
        engines: by network name; "gradient" is the fused one in latents, or in pixels where `pixels` is set.
        pixels: images stand in the place of latents.
    """

    def __init__(self, guidance: Guidance, engines: Mapping[str, Call], pixels: bool = False) -> None:
        decode = identity if pixels else guidance.decode
        losses = (guidance.teacher, guidance.weights, guidance.student)
        kernels, taps = guidance.kernels, guidance.taps
        super().__init__(decode, *losses, guidance.loss_scale, guidance.loss_dtype, kernels, taps)
        self.engines, self.pixels = engines, pixels

    def at_decoder(self, prior: Prior) -> Guidance:
        return self  # its gradients are of clean latents: an engine holds the way to the decoder's input

    def on_pixels(self) -> Guidance:
        return CompiledGuidance(Guidance.on_pixels(self), self.engines, pixels=True)

    def of_batch(
        self, latents: Tensor, labels: Tensor, group: GroupLoss | None = None, to_latent: Decode = identity
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if to_latent is not identity:
            return super().of_batch(latents, labels, group, to_latent)
        fused = self.engines.get("pixel_gradient" if self.pixels else "gradient")
        if fused is not None and group is None and not self.weights.adv:
            gradient, *losses = fused(latents, labels)
            return gradient, dict(zip(losses_recorded(self.weights), losses, strict=True))
        if self.pixels:
            return self._of_images(latents, labels, group)
        if "decode_vjp" not in self.engines:
            return super().of_batch(latents, labels, group)
        gradient, record = self._of_images(self._decoded(latents), labels, group)
        return self.engines["decode_vjp"](latents, gradient)[0], record

    def _of_images(self, images: Tensor, labels: Tensor, group: GroupLoss | None) -> tuple[Tensor, dict[str, Tensor]]:
        engine = self.engines.get("image_gradient")
        if engine is None or group is None or self.weights.adv:
            on_pixels = self if self.pixels else Guidance.on_pixels(self)
            return Guidance.of_batch(on_pixels, images, labels, group)
        slopes = side_by_side([Moments(s.m1.float(), s.m2.float()) for s in group.slopes])
        gradient, *cls = engine(images, labels, slopes[0][0], slopes[1][0])
        record = {"cls": cls[0]} if cls else {}
        return gradient, record | {"bn": group.value.to(gradient).expand(gradient.shape[0])}

    def _moments(self, z0: Tensor) -> list[Moments]:
        engine = self.engines.get("image_moments")
        if engine is None:
            return super()._moments(z0)
        return one_by_one(self.layers, *engine(z0 if self.pixels else self._decoded(z0)))

    def _decoded(self, z0: Tensor) -> Tensor:
        if "decode" in self.engines:
            return self.engines["decode"](z0)[0]
        with torch.no_grad():
            return self.decode(z0)
