"""Guided sampling: the two loops. Networks, gradients, noise and mixing arrive as functions (pack.Pack has them).

    latent   m = UNet(z);  z0hat = z0_z z + z0_model m;  g = dL/dz0hat through decoder and teacher
             z0hat <- z0hat - rho g with eps held, then the sampler's step                     one UNet call
    unet     g = dL/dz through UNet, decoder and teacher;  z <- z - rho g                      arXiv 2504.00870
             m = UNet(z) again, then the sampler's step                                        two, and a backward pass

rho g is a guidance step: its length times the gradient, of unit root mean square per image or as it is. Nothing in the
loops waits for the device: coefficients, times and boxes are there before they begin.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dfkd_kernels.guided_step import Mix, Noise, clean_estimate, guided_step_ref
from dfkd_kernels.philox import philox_normal

Step = Callable[..., tuple[Tensor, Tensor]]  # dfkd_kernels.guided_step.guided_step, or its reference
# Step number, latents z and the clean estimate before them (None in the first step) -> both, like them.
Enter = Callable[[int, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
Leave = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]  # the same, behind a step


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


@dataclass(frozen=True)
class Repair:
    """Boxes that are noised back to the level before a step, and denoised again (RePaint, arXiv 2201.09865).

    inside: bool [B, 1, h, w]. ratio, spread: z at that level is ratio z' + spread n, for z' behind the step.
    noises: for every turn, of n and of the step itself, None where its sampler draws none. mixed: what the images have
    been through, for the clean estimate before the step.
    """

    inside: Tensor
    ratio: float
    spread: float
    noises: Sequence[tuple[Noise, Noise | None]]
    mixed: Callable[[Tensor], Tensor]

    def __call__(
        self, came: Tensor, z: Tensor, clean: Tensor, take: Callable[[Tensor, Noise | None], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """z and its clean estimate behind a step, new inside of the boxes and as they are outside.

        came: the latents that the step began with, what the boxes see around them. take: the step, without guidance.
        """
        for (seed, ids, stream), own in self.noises:
            noise = philox_normal(seed, ids, stream, tuple(z.shape[1:]), z.dtype)
            again, estimate = take(torch.where(self.inside, self.ratio * z + self.spread * noise, came), own)
            z, clean = torch.where(self.inside, again, z), torch.where(self.inside, estimate, clean)
        return z, clean


def predicted(z: Tensor, model: Tensor, row: Tensor, clip: Clip | None) -> tuple[Tensor, Tensor, Tensor]:
    """The network's output [K, B, ...] as a step takes it, the clean estimate that it means, and what clips that."""
    model = model if clip is None else clip.output(z, model, row)
    clean, still = clean_estimate(z, model, row), torch.zeros_like(z)
    return model, clean, still if clip is None else clip.push(clean, still)


def retaking(
    i: int, row: Tensor, denoise: Denoise, step: Step, clip: Clip | None, before: Tensor | None
) -> Callable[[Tensor, Noise | None], tuple[Tensor, Tensor]]:
    """Step i without guidance, as a function of latents and noise; before: the clean estimate of the step before it."""

    def take(z: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        model, _, push = predicted(z, denoise(z, i), row, clip)
        return step(z, model, row, push=push, before=before, noise=noise)

    return take


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
    enter: Enter = lambda i, z, before: (z, before),
    leave: Leave = lambda i, z, z0: (z, z0),
    repair: Callable[[int], Repair | None] = lambda i: None,
    after: Leave = lambda i, z, z0: (z, z0),
    step: Step = guided_step_ref,
    clip: Clip | None = None,
    first: int = 0,
) -> Tensor:
    """Latents z [B, C, h, w] of pure noise -> clean latents, guided in the clean estimate (`latent` above).

    rows: [S, 8] on the device of z, the coefficients of dfkd_kernels.guided_step for every step, noise first.
    first: the number of the first of them, where the trajectory begins further on.
    Functions of the step's number i: repeats, guidance steps at it, 0 for none; noise, what a stochastic sampler adds;
    mix, partners and boxes of a Latent CutMix behind it; enter and leave, mixing before its UNet call and behind it;
    repair, boxes to be denoised again behind both; after, which may replace z and z0hat in the end.
    clip: the bounds of the clean estimate, for a prior on pixels.
    """
    before = None
    for i, row in enumerate(rows, first):
        z, before = enter(i, z, before)
        model, clean, push = predicted(z, denoise(z, i), row, clip)
        for _ in range(repeats(i)):
            push = push - guide(clean + push, i)
            push = push if clip is None else clip.push(clean, push)
        behind = leave(i, *step(z, model, row, push=push, before=before, noise=noise(i), mix=mix(i)))
        if (again := repair(i)) is not None:
            earlier = None if before is None else again.mixed(before)
            behind = again(z, *behind, retaking(i, row, denoise, step, clip, earlier))
        z, before = after(i, *behind)
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
    enter: Enter = lambda i, z, before: (z, before),
    leave: Leave = lambda i, z, z0: (z, z0),
    repair: Callable[[int], Repair | None] = lambda i: None,
    after: Leave = lambda i, z, z0: (z, z0),
    step: Step = guided_step_ref,
    clip: Clip | None = None,
    first: int = 0,
) -> Tensor:
    """`sample` with the gradient through the UNet (`unet` above, the published method); arguments are the same."""
    before = None
    for i, row in enumerate(rows, first):

        def to_latent(z: Tensor, images: Tensor, i: int = i, row: Tensor = row) -> Tensor:
            return clean_estimate(z, denoise(z, i, images), row)

        for _ in range(repeats(i)):
            z = z - guide(z, i, to_latent)
        z, before = enter(i, z, before)
        model, _, push = predicted(z, denoise(z, i), row, clip)
        behind = leave(i, *step(z, model, row, push=push, before=before, noise=noise(i), mix=mix(i)))
        if (again := repair(i)) is not None:
            earlier = None if before is None else again.mixed(before)
            behind = again(z, *behind, retaking(i, row, denoise, step, clip, earlier))
        z, before = after(i, *behind)
    return z


def begun(rows: Tensor) -> Tensor:
    """Rows [S, 8] of a trajectory that begins here: its first step is of first order, having no estimate before it.

    The factor of z0hat_before, where a sampler has one, goes to z0hat itself.
    """
    rows = rows.clone()
    z0_z, z0_model, prev = rows[0, 0], rows[0, 1], rows[0, 4].clone()
    rows[0, 2] += prev * z0_z
    rows[0, 3] += prev * z0_model
    rows[0, 6] += prev
    rows[0, 4] = 0
    return rows


def edit_noise(z: Tensor, gradient: Callable[[Tensor], Tensor], steps: int, length: float) -> Tensor:
    """Gradient descent of L_bn on the initial noise z_T [B, C, h, w] (FedCADO, arXiv 2311.08870)."""
    for _ in range(steps):
        z = z - length * gradient(z)
    return z


def refine(
    images: Tensor, gradient: Callable[[Tensor], Tensor], steps: int, length: float, smooth: float = 0.0
) -> Tensor:
    """Guidance on pixels [B, 3, H, W] in 0..1, as DeepInversion (arXiv 1912.08795) does from noise.

    A decoder cannot draw all the texture that the teacher's statistics ask for, and a step here needs no decoder.
    length: root mean square of the first step, falling linearly to 0. smooth: as of `smoothed`.
    """
    for i in range(steps):
        images = (images - length * (1 - i / steps) * unit_rms(smoothed(gradient(images), smooth))).clamp(0, 1)
    return images


def smoothed(images: Tensor, deviation: float) -> Tensor:
    """[B, C, H, W] smoothed by a Gaussian of this deviation in pixels, which is cut off at the edges; 0: as it is."""
    if not deviation:
        return images
    down, across = (
        torch.arange(side, device=images.device, dtype=images.dtype).sub(torch.arange(side)[:, None].to(images))
        for side in images.shape[2:]
    )
    down, across = (distance.div(deviation).square().div(-2).softmax(1) for distance in (down, across))
    return down @ images @ across.T


def unit_rms(gradient: Tensor) -> Tensor:
    """The gradient [B, C, h, w] with a root mean square of 1 for every image; a zero gradient stays zero."""
    # By the largest value first: squares of a sure teacher's gradients, 1e-25 and below, would underflow.
    tiny = torch.finfo(gradient.dtype).tiny
    unit = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(tiny)
    return unit / unit.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(tiny)
