"""Guided sampling of one group of images: the loop, in one screen.

A step, on the `latent` path (ours) and on the `unet` path (published, arXiv 2504.00870):

    latent   m = UNet(z);  z0hat = z0_z z + z0_model m;  g = dL/dz0hat through decoder and teacher
             z0hat <- z0hat - rho g with eps held, then the sampler's step                 one UNet call
    unet     g = dL/dz through UNet, decoder and teacher;  z <- z - rho g
             m = UNet(z) again, then the sampler's step                                    two UNet calls, one backward

Beside the networks a step is two launches (kernels/guided_step.py), in PyTorch or in Triton. Nothing in the loop waits
for the device: coefficients, times, boxes and lengths are there before it begins.

A group is sampled whole. Noise, labels and CutMix follow from (run seed, image id), so an image does not depend on
batch, order or restarts; networks are called on micro-batches of one shape.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dfkd.synthesis import cutmix
from dfkd.synthesis.guidance import Guidance, ToLatent
from dfkd.synthesis.memory import calling
from dfkd.synthesis.microbatch import cuts, in_microbatches
from dfkd.synthesis.schedule import Step, StepTable
from dfkd_engine.networks import Prior
from dfkd_kernels.guided_push import scaled
from dfkd_kernels.guided_step import GUIDED_STEPS
from dfkd_kernels.philox import philox_normal
from dfkd_kernels.rows import NetworkInput, network_rows

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
    """The network with classifier-free guidance, cut into micro-batches: eps_u + w (eps_c - eps_u)."""

    def __init__(self, prior: Prior, conditional: Tensor, unconditional: Tensor, cfg: float, micro: int) -> None:
        self.prior, self.conditional, self.unconditional = prior, conditional, unconditional
        self.cfg, self.micro = cfg, micro
        self._contexts: dict[int, list[Tensor]] = {}

    def outputs(self, rows: Tensor, t: Tensor, copies: int) -> Tensor:
        """What the network gives for the whole group's rows, laid out as kernels/rows.py says, at time t."""
        contexts = self._contexts.setdefault(copies, [])
        if not contexts:
            for taken, _ in cuts(len(self.conditional), self.micro, self.conditional.device):
                contexts.append(self._context(self.conditional[taken], copies))
        parts = zip(rows.chunk(len(contexts)), contexts, strict=True)
        with calling("unet"):
            found = [self.prior.denoise(part, t, context) for part, context in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _context(self, context: Tensor, copies: int) -> Tensor:
        return context if copies == 1 else torch.cat([self.unconditional.expand_as(context), context])

    def rows(self, z: Tensor, rows: Tensor, t: Tensor, with_cfg: bool) -> Tensor:
        """z [B, C, h, w], the latents of group rows `rows` [B], at time t -> the network's output [B, C, h, w]."""
        context = self._context(self.conditional[rows], 1 + with_cfg)
        if not with_cfg:
            return self.prior.denoise(z, t, context)
        free, prompted = self.prior.denoise(torch.cat([z, z]), t, context).chunk(2)
        return free + self.cfg * (prompted - free)

    def __call__(self, z: Tensor, t: Tensor, with_cfg: bool) -> Tensor:
        return in_microbatches(lambda rows: self.rows(z[rows], rows, t, with_cfg), len(z), self.micro, z.device)


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
    kernels: str = "torch",
    gradient_micro: int | None = None,
    decode_micro: int | None = None,
) -> SampledGroup:
    """Sample the images `ids` [G] of one whole group with `labels` int64 [G].

    Args:
        prior: frozen networks.
        guidance: None samples without a teacher.
        table: coefficients of the steps.
        conditional: prompt embeddings [G, L, D]; unconditional [1, L, D].
        latent_size: (h, w) of the latents.
        micro: images per call of the UNet.
        kernels: of GUIDED_STEPS, "torch" or "triton"; results differ by rounding.
        gradient_micro, decode_micro: images per call of the guidance gradient, and of the decoder at the end; None:
            micro.

    Raises:
        ShortMemory: a network call found too little memory.
        FloatingPointError: latents or images are not finite (names the image ids).
    """
    shape, steps, micro = (prior.latent_channels, *latent_size), len(table), min(micro, len(ids))
    numbers = [table.row(i) for i in range(steps)]
    denoise = Denoiser(prior, conditional, unconditional, settings.cfg, micro)
    gradient_micro = gradient_micro or micro
    z = table.init_scale * philox_normal(seed, ids, INITIAL_NOISE, shape)
    if guidance and settings.noise_edit_steps:
        with calling("gradient"):
            z = edit_noise(z, guidance, table, settings, denoise, labels, gradient_micro)
    fused, unet, at_latent = GUIDED_STEPS[kernels], NetworkInput(), guidance
    if kernels == "triton":
        unet, at_latent = prior.unet_input, guidance and guidance.at_decoder(prior)
        z = z.contiguous(memory_format=unet.memory_format)
    copies = [1 + settings.classifier_free(i, steps) for i in range(steps)]
    paths = [settings.gradient if guidance and settings.guided(i, steps) else "" for i in range(steps)]
    coefficients, times = table.coefficients(settings.cfg, z), table.timesteps.to(z.device, torch.float32)
    length, norm = z.new_full((len(z),), settings.guidance_step), settings.guidance_norm
    repeats = range(1, settings.guidance_repeats)
    plans = cutmix_plans(settings, steps, seed, ids, labels, latent_size)
    mixes = {i: (plan.partner.to(z.device), plan.box.to(z.device)) for i, plan in plans.items()}
    curves: dict[str, list[Tensor]] = {}
    rows, before = network_rows(unet.of(z), micro, copies[0]), None
    for i in range(steps):
        gradient, push, unit = None, None, 1.0
        losses: dict[str, Tensor] = {}
        if guidance and paths[i] == "unet":
            to_latent = clean_estimate(denoise, numbers[i], times[i], copies[i] == 2)
            for _ in range(settings.guidance_repeats):
                with calling("gradient"):
                    gradient, losses = guidance.gradient(z, labels, gradient_micro, to_latent)
                z, rows = fused.push(z, gradient, length, norm, 1.0, None, unet, micro, copies[i])
            gradient = None  # it has moved z already
        model = denoise.outputs(rows, times[i], copies[i])
        if at_latent and paths[i] == "latent":
            takes, unit = at_latent.takes, at_latent.unit
            point, clean = fused.clean(z, model, coefficients[i], micro, copies[i], takes, bool(repeats))
            with calling("gradient"):
                gradient, losses = at_latent.gradient(point, labels, gradient_micro)
            for _ in repeats:
                push, point = fused.push(push, gradient, length, norm, unit, clean, takes, len(z), 1)
                with calling("gradient"):
                    gradient, losses = at_latent.gradient(point, labels, gradient_micro)
        for name, value in losses.items():
            curves.setdefault(name, []).append(value)
        last = i + 1 == steps
        z, rows, before = fused.update(
            z, model, coefficients[i], micro, copies[i],
            gradient=gradient, length=None if gradient is None else length, norm=norm, unit=unit, push=push,
            before=before,
            noise=(seed, ids, 1 + i) if numbers[i].step_noise else None,
            mix=mixes.get(i),
            network=None if last or paths[i + 1] == "unet" else unet,  # there a push writes the rows
            next_copies=1 if last else copies[i + 1],
            keep=not last and numbers[i + 1].step_prev != 0,
        )  # fmt: skip
    plan = plans[max(plans)] if plans else None
    with calling("decode"):
        images = in_microbatches(lambda rows: prior.decode(z[rows]).float(), len(z), decode_micro or micro, z.device)
    if guidance and settings.refine_steps:
        with calling("gradient"):
            images = refine(images, guidance, settings, labels, gradient_micro)
    finite = z.isfinite().flatten(1).all(1) & images.isfinite().flatten(1).all(1)
    if not finite.all():
        raise FloatingPointError(f"the images {ids[~finite].tolist()} are not finite")
    return SampledGroup(z, images, {name: torch.stack(values, 1) for name, values in curves.items()}, plan)


def clean_estimate(denoise: Denoiser, row: Step, t: Tensor, with_cfg: bool) -> ToLatent:
    """z, rows -> z0hat through the UNet, differentiable."""
    return lambda z, rows: row.z0_z * z + row.z0_model * denoise.rows(z, rows, t, with_cfg)


def cutmix_plans(
    settings: SamplerSettings, steps: int, seed: int, ids: Tensor, labels: Tensor, latent_size: tuple[int, int]
) -> dict[int, cutmix.CutMixPlan]:
    """The Latent CutMix after each step that one is due after; none follows the last step."""
    ids, labels = ids.cpu(), labels.cpu()
    due = [i for i in range(steps - 1) if settings.cutmix_every and (i + 1) % settings.cutmix_every == 0]
    return {i: cutmix.plan(seed, ids, labels, i, settings.cutmix_alpha, *latent_size) for i in due}


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
