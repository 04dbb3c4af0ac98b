"""Guided sampling of one group of images: the loop, in one screen.

A step, on the `latent` path (ours) and on the `unet` path (published, arXiv 2504.00870):

    latent   m = UNet(z);  z0hat = z0_z z + z0_model m;  g = dL/dz0hat through decoder and teacher
             z0hat <- z0hat - rho g with eps held, then the sampler's step                 one UNet call
    unet     g = dL/dz through UNet, decoder and teacher;  z <- z - rho g
             m = UNet(z) again, then the sampler's step                                    two UNet calls, one backward

A group is sampled whole. Noise, labels and CutMix follow from (run seed, image id), so an image does not depend on
batch, order or restarts; networks are called on micro-batches of one shape.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dfkd.synthesis import cutmix
from dfkd.synthesis.guidance import Guidance
from dfkd.synthesis.microbatch import in_microbatches
from dfkd.synthesis.schedule import Step, StepTable
from engine.networks import Prior
from kernels.philox import philox_normal

INITIAL_NOISE = 0  # Philox stream of z_T; step i draws from stream 1 + i


@dataclass(frozen=True)
class SamplerSettings:
    """How a group is sampled.

    gradient             "latent" or "unet", the two paths above
    guidance_step        rho, the length of a guidance step, in units of the latent (rms) or of the gradient (none)
    guidance_repeats     guidance steps at every denoising step (N_iter of TFG, arXiv 2409.15761)
    guidance_norm        "rms": every image's gradient is divided by its root mean square; "none": as it is (published)
    guide_from, guide_to share of the steps, 0 = noise to 1 = image, in which the teacher guides
    cfg                  classifier-free scale w; 1 uses the prompt alone
    cfg_from, cfg_to     share of the steps in which w acts; outside it the prompt alone is used (arXiv 2404.07724)
    cutmix_every         Latent CutMix after every so many steps, 0 for never
    cutmix_alpha         lam ~ Beta(alpha, alpha)
    noise_edit_steps     gradient steps of L_bn on z_T before sampling (FedCADO, arXiv 2311.08870)
    noise_edit_scale     their length, times the gradient of L_bn
    refine_steps         guidance steps on the finished image's pixels, past what the decoder can express
    refine_step          length (rms, of pixels in 0..1) of the first of them, falling linearly to 0
    """

    gradient: str = "latent"
    guidance_step: float = 0.2
    guidance_repeats: int = 1
    guidance_norm: str = "rms"
    guide_from: float = 0.0
    guide_to: float = 1.0
    cfg: float = 3.0
    cfg_from: float = 0.0
    cfg_to: float = 1.0
    cutmix_every: int = 0
    cutmix_alpha: float = 1.0
    noise_edit_steps: int = 0
    noise_edit_scale: float = 0.1
    refine_steps: int = 0
    refine_step: float = 0.02

    def guided(self, step: int, steps: int) -> bool:
        return self.guidance_step > 0 and self.guide_from <= step / steps < self.guide_to

    def classifier_free(self, step: int, steps: int) -> bool:
        return self.cfg != 1 and self.cfg_from <= step / steps < self.cfg_to


@dataclass(frozen=True)
class SampledGroup:
    """A group as it came out.

    latents  float32 [G, C, h, w]
    images   in 0..1, float32 [G, 3, H, W]
    curves   guidance losses by name, [G, guided steps], taken before the last guidance step of each denoising step
    plan     the last Latent CutMix (partners are positions in the group), None without one
    """

    latents: Tensor
    images: Tensor
    curves: dict[str, Tensor]
    plan: cutmix.CutMixPlan | None


class Denoiser:
    """The network's output with classifier-free guidance, cut into micro-batches: eps_u + w (eps_c - eps_u)."""

    def __init__(self, prior: Prior, conditional: Tensor, unconditional: Tensor, cfg: float, micro: int) -> None:
        self.prior, self.conditional, self.unconditional = prior, conditional, unconditional
        self.cfg, self.micro = cfg, micro

    def rows(self, z: Tensor, rows: Tensor, t: Tensor, with_cfg: bool) -> Tensor:
        """z [B, C, h, w], the latents of group rows `rows` [B], at time t -> the network's output [B, C, h, w]."""
        context = self.conditional[rows]
        if not with_cfg:
            return self.prior.denoise(z, t, context)
        both = torch.cat([self.unconditional.expand_as(context), context])
        free, prompted = self.prior.denoise(torch.cat([z, z]), t, both).chunk(2)
        return free + self.cfg * (prompted - free)

    def __call__(self, z: Tensor, t: Tensor, with_cfg: bool) -> Tensor:
        return in_microbatches(lambda rows: self.rows(z[rows], rows, t, with_cfg), len(z), self.micro)


def scaled(gradient: Tensor, norm: str) -> Tensor:
    """The gradient as guidance uses it: of unit root mean square per image, or as it is. A zero gradient stays zero."""
    if norm == "none":
        return gradient
    # By the largest value first: squares of a sure teacher's gradients, 1e-25 and below, would underflow.
    largest = gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    unit = gradient / largest
    rms = unit.square().mean((1, 2, 3), keepdim=True).sqrt()
    return unit / rms.clamp_min(torch.finfo(gradient.dtype).tiny)


@torch.no_grad()
def sample_group(
    prior: Prior,
    guidance: Guidance | None,
    table: StepTable,
    settings: SamplerSettings,
    seed: int,
    ids: Tensor,
    labels: Tensor,
    conditional: Tensor,
    unconditional: Tensor,
    latent_size: tuple[int, int],
    micro: int,
    gradient_micro: int | None = None,
) -> SampledGroup:
    """Sample the images `ids` [G] of one whole group with `labels` int64 [G].

    Args:
        prior: frozen networks.
        guidance: None samples without a teacher.
        table: coefficients of the steps.
        conditional: prompt embeddings [G, L, D]; unconditional [1, L, D].
        latent_size: (h, w) of the latents.
        micro: images per network call.
        gradient_micro: images per call of the guidance gradient; None: micro.

    Raises:
        FloatingPointError: latents or images are not finite (names the image ids).
    """
    shape = (prior.latent_channels, *latent_size)
    denoise = Denoiser(prior, conditional, unconditional, settings.cfg, micro)
    gradient_micro = gradient_micro or micro
    z = table.init_scale * philox_normal(seed, ids, INITIAL_NOISE, shape)
    if guidance and settings.noise_edit_steps:
        z = edit_noise(z, guidance, table, settings, denoise, labels, gradient_micro)
    curves: dict[str, list[Tensor]] = {}
    z0_before, plan = torch.zeros_like(z), None
    for i in range(len(table)):
        row = table.row(i)
        t = torch.as_tensor(row.timestep, device=z.device)
        with_cfg, guided = settings.classifier_free(i, len(table)), settings.guided(i, len(table))
        push = torch.zeros_like(z)
        losses: dict[str, Tensor] = {}
        if guidance and guided and settings.gradient == "unet":

            def to_latent(z: Tensor, rows: Tensor, t: Tensor = t, row: Step = row, cfg: bool = with_cfg) -> Tensor:
                return row.z0_z * z + row.z0_model * denoise.rows(z, rows, t, cfg)

            for _ in range(settings.guidance_repeats):
                gradient, losses = guidance.gradient(z, labels, gradient_micro, to_latent)
                z = z - settings.guidance_step * scaled(gradient, settings.guidance_norm)
        model = denoise(z, t, with_cfg)
        z0 = row.z0_z * z + row.z0_model * model
        if guidance and guided and settings.gradient == "latent":
            for _ in range(settings.guidance_repeats):
                gradient, losses = guidance.gradient(z0 + push, labels, gradient_micro)
                push = push - settings.guidance_step * scaled(gradient, settings.guidance_norm)
        for name, value in losses.items():
            curves.setdefault(name, []).append(value)
        z = row.step_z * z + row.step_model * model + row.step_prev * z0_before + row.step_z0 * push
        if row.step_noise:
            z = z + row.step_noise * philox_normal(seed, ids, 1 + i, shape)
        z0_before = z0 + push
        if settings.cutmix_every and (i + 1) % settings.cutmix_every == 0 and i + 1 < len(table):
            plan = cutmix.plan(seed, ids, labels, i, settings.cutmix_alpha, *latent_size)
            z, z0_before = cutmix.apply(z, plan), cutmix.apply(z0_before, plan)
    images = in_microbatches(lambda rows: prior.decode(z[rows]).float(), len(z), micro)
    if guidance and settings.refine_steps:
        images = refine(images, guidance, settings, labels, gradient_micro)
    finite = z.isfinite().flatten(1).all(1) & images.isfinite().flatten(1).all(1)
    if not finite.all():
        raise FloatingPointError(f"the images {ids[~finite].tolist()} are not finite")
    return SampledGroup(z, images, {name: torch.stack(values, 1) for name, values in curves.items()}, plan)


def edit_noise(
    z: Tensor,
    guidance: Guidance,
    table: StepTable,
    settings: SamplerSettings,
    denoise: Denoiser,
    labels: Tensor,
    micro: int,
) -> Tensor:
    """Gradient descent of L_bn on the initial noise z_T [G, C, h, w], along the path that `settings.gradient` names."""
    row = table.row(0)
    t = torch.as_tensor(row.timestep, device=z.device)
    with_cfg = settings.classifier_free(0, len(table))
    statistics = guidance.statistics_alone()

    def to_latent(z: Tensor, rows: Tensor) -> Tensor:
        if settings.gradient == "unet":
            return row.z0_z * z + row.z0_model * denoise.rows(z, rows, t, with_cfg)
        with torch.no_grad():
            model = denoise.rows(z, rows, t, with_cfg)
        return row.z0_z * z + row.z0_model * model

    for _ in range(settings.noise_edit_steps):
        gradient, _ = statistics.gradient(z, labels, micro, to_latent)
        z = z - settings.noise_edit_scale * gradient
    return z


def refine(images: Tensor, guidance: Guidance, settings: SamplerSettings, labels: Tensor, micro: int) -> Tensor:
    """Guidance on pixels [G, 3, H, W] in 0..1, as DeepInversion (arXiv 1912.08795) does from noise.

    A decoder cannot draw all the texture that the teacher's statistics ask for, and a step here needs no decoder.
    """
    on_pixels = guidance.on_pixels()
    for i in range(settings.refine_steps):
        gradient, _ = on_pixels.gradient(images, labels, micro)
        length = settings.refine_step * (1 - i / settings.refine_steps)
        images = (images - length * scaled(gradient, "rms")).clamp(0, 1)
    return images
