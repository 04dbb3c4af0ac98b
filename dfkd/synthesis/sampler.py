"""Guided sampling: the two loops. Networks, gradients, noise and mixing arrive as functions (pack.Pack has them).

    latent   m = UNet(z);  z0hat = z0_z z + z0_model m;  g = dL/dz0hat through decoder and teacher
             z0hat <- z0hat - rho g with eps held, then the sampler's step                     one UNet call
    unet     g = dL/dz through UNet, decoder and teacher;  z <- z - rho g                      arXiv 2504.00870
             m = UNet(z) again, then the sampler's step                                        two, and a backward pass

rho g is a guidance step: its length times the gradient, of unit root mean square per image or as it is. Nothing in the
loops waits for the device: coefficients, times and boxes are there before they begin.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dfkd_kernels.guided_step import Mix, Noise, clean_estimate, guided_step_ref

Step = Callable[..., tuple[Tensor, Tensor]]  # dfkd_kernels.guided_step.guided_step, or its reference


class Denoise(Protocol):
    """Latents z [B, C, h, w] at step i -> the UNet's output [K, B, C, h, w]: K = 1, or unconditional and conditional.

    images: which images of the pack the latents are, int64 [B]; None: all.
    """

    def __call__(self, z: Tensor, i: int, images: Tensor | None = None) -> Tensor: ...


class ToLatent(Protocol):
    """Points [B, C, h, w] where a gradient is taken, and which images they are (int64 [B]) -> clean latents z0hat."""

    def __call__(self, z: Tensor, images: Tensor) -> Tensor: ...


class Guide(Protocol):
    """The guidance step rho g at step i in `point`, like it; through `to_latent` where the point is no clean latent."""

    def __call__(self, point: Tensor, i: int, to_latent: ToLatent | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Clip:
    """clip_sample of a prior on pixels: z0hat clamped to -limit..limit.

    holds_z: whether the sampler holds z while its estimate moves, so that eps follows (DDPM, LCM), or holds eps (DDIM).
        What guidance adds holds eps in either case.
    """

    limit: float
    holds_z: bool

    def output(self, z: Tensor, model: Tensor, row: Tensor) -> Tensor:
        """The network's output [K, B, ...] or, where z is held, the one [1, B, ...] that means the clamped estimate."""
        if not self.holds_z:
            return model
        bounded = clean_estimate(z, model, row).clamp(-self.limit, self.limit)
        return ((bounded - row[0] * z) / row[1])[None]

    def push(self, clean: Tensor, push: Tensor) -> Tensor:
        """What is added to the clean estimate, cut so that the sum is in the range."""
        return (clean + push).clamp(-self.limit, self.limit) - clean


@torch.no_grad()
def sample(
    z: Tensor,
    rows: Tensor,
    denoise: Denoise,
    guide: Guide,
    *,
    repeats: Callable[[int], int],
    noise: Callable[[int], Noise | None] = lambda i: None,
    mix: Callable[[int], Mix | None] = lambda i: None,
    after: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda i, z, z0: (z, z0),
    step: Step = guided_step_ref,
    clip: Clip | None = None,
) -> Tensor:
    """Latents z [B, C, h, w] of pure noise -> clean latents, guided in the clean estimate (`latent` above).

    rows: [S, 8] on the device of z, the coefficients of dfkd_kernels.guided_step for every step, noise first.
    Functions of the step's number i: repeats, guidance steps at it, 0 for none; noise, what a stochastic sampler adds;
    mix, partners and boxes of a Latent CutMix behind it; after, which may replace z and z0hat behind it.
    clip: the bounds of the clean estimate, for a prior on pixels.
    """
    before = None
    for i, row in enumerate(rows):
        model = denoise(z, i) if clip is None else clip.output(z, denoise(z, i), row)
        clean = clean_estimate(z, model, row)
        push = torch.zeros_like(z) if clip is None else clip.push(clean, torch.zeros_like(z))
        for _ in range(repeats(i)):
            push = push - guide(clean + push, i)
            push = push if clip is None else clip.push(clean, push)
        z, before = step(z, model, row, push=push, before=before, noise=noise(i), mix=mix(i))
        z, before = after(i, z, before)
    return z


@torch.no_grad()
def sample_through_unet(
    z: Tensor,
    rows: Tensor,
    denoise: Denoise,
    guide: Guide,
    *,
    repeats: Callable[[int], int],
    noise: Callable[[int], Noise | None] = lambda i: None,
    mix: Callable[[int], Mix | None] = lambda i: None,
    after: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda i, z, z0: (z, z0),
    step: Step = guided_step_ref,
    clip: Clip | None = None,
) -> Tensor:
    """`sample` with the gradient through the UNet (`unet` above, the published method); arguments are the same."""
    before = None
    for i, row in enumerate(rows):

        def to_latent(z: Tensor, images: Tensor, i: int = i, row: Tensor = row) -> Tensor:
            return clean_estimate(z, denoise(z, i, images), row)

        for _ in range(repeats(i)):
            z = z - guide(z, i, to_latent)
        model = denoise(z, i) if clip is None else clip.output(z, denoise(z, i), row)
        push = None if clip is None else clip.push(clean_estimate(z, model, row), torch.zeros_like(z))
        z, before = step(z, model, row, push=push, before=before, noise=noise(i), mix=mix(i))
        z, before = after(i, z, before)
    return z


def edit_noise(z: Tensor, gradient: Callable[[Tensor], Tensor], steps: int, length: float) -> Tensor:
    """Gradient descent of L_bn on the initial noise z_T [B, C, h, w] (FedCADO, arXiv 2311.08870)."""
    for _ in range(steps):
        z = z - length * gradient(z)
    return z


def refine(images: Tensor, gradient: Callable[[Tensor], Tensor], steps: int, length: float) -> Tensor:
    """Guidance on pixels [B, 3, H, W] in 0..1, as DeepInversion (arXiv 1912.08795) does from noise.

    A decoder cannot draw all the texture that the teacher's statistics ask for, and a step here needs no decoder.
    length: root mean square of the first step, falling linearly to 0.
    """
    for i in range(steps):
        images = (images - length * (1 - i / steps) * unit_rms(gradient(images))).clamp(0, 1)
    return images


def unit_rms(gradient: Tensor) -> Tensor:
    """The gradient [B, C, h, w] with a root mean square of 1 for every image; a zero gradient stays zero."""
    # By the largest value first: squares of a sure teacher's gradients, 1e-25 and below, would underflow.
    tiny = torch.finfo(gradient.dtype).tiny
    unit = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(tiny)
    return unit / unit.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(tiny)
