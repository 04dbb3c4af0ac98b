"""The network calls of a synthesis as functions of how many images they hold, on inputs of their own.

    unet            the denoiser, with two rows an image where classifier-free guidance acts
    decode          latents -> images
    gradient        the guidance gradient, through the UNet on the `unet` path
    pixel_gradient  the same on pixels, of the refinement
    noise_edit      the gradient of L_bn on the initial noise, with the UNet in it

Bytes and seconds are taken of them. Nothing random enters, and no result of theirs is kept.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from dfkd.synthesis.guidance import Guidance, identity
from dfkd.synthesis.run import Synthesis
from dfkd.synthesis.sampler import Denoiser, clean_estimate

Call = Callable[[int], object]
GRADIENTS = ("gradient", "pixel_gradient", "noise_edit")  # have one number of rows


def copies_of(synthesis: Synthesis) -> int:
    """The most rows that an image has in a call of the UNet: 2 where classifier-free guidance acts at any step."""
    steps = len(synthesis.table)
    return 1 + any(synthesis.settings.classifier_free(i, steps) for i in range(steps))


def guided_with_cfg(synthesis: Synthesis) -> bool:
    """Whether classifier-free guidance acts in a step in which the teacher guides."""
    settings, steps = synthesis.settings, len(synthesis.table)
    return any(settings.guided(i, steps) and settings.classifier_free(i, steps) for i in range(steps))


def network_calls(synthesis: Synthesis, parts: int = 1) -> Mapping[str, Call]:
    """Those that the synthesis makes, the largest where steps differ.

    parts: how many calls a group's gradient takes; with several, the call is the mean one of a group in two parts, the
        pass that takes the group's statistics included.
    """
    prior, settings, guidance, device = synthesis.prior, synthesis.settings, synthesis.guidance, synthesis.device
    copies, guided = copies_of(synthesis), guided_with_cfg(synthesis)
    words, first = prior.encode_prompts([synthesis.negative_prompt]), synthesis.table.row(0)
    factor = prior.vae_scale_factor
    image = 3, factor * synthesis.latent_size[0], factor * synthesis.latent_size[1]
    latent = prior.latent_channels, *synthesis.latent_size

    def points(rows: int, shape: tuple[int, ...] = latent) -> Tensor:
        return torch.full((rows, *shape), 0.5, device=device)

    def context(rows: int) -> Tensor:
        return torch.zeros((rows, *words.shape[1:]), dtype=words.dtype, device=device)

    @torch.no_grad()
    def unet(rows: int) -> object:
        return prior.denoise(points(copies * rows), points(1, ())[0], context(copies * rows))

    @torch.no_grad()
    def decode(rows: int) -> object:
        return prior.decode(points(rows))

    def gradient(
        rows: int, guidance: Guidance, shape: tuple[int, ...] = latent, through_unet: bool = False, cfg: bool = False
    ) -> object:
        images = rows if parts == 1 else 2 * rows
        labels = torch.zeros(images, dtype=torch.int64, device=device)
        to_latent = None
        if through_unet:
            denoise = Denoiser(prior, context(images), context(1), settings.cfg, rows)
            to_latent = clean_estimate(denoise, first, points(1, ())[0], cfg)
        if parts > 1:
            return guidance.gradient(points(images, shape), labels, rows, to_latent)
        way = partial(to_latent, rows=torch.arange(images, device=device)) if to_latent else identity
        return guidance.of_batch(points(images, shape), labels, None, way)

    found: dict[str, Call] = {"unet": unet, "decode": decode}
    if guidance is None:
        return found
    found["gradient"] = partial(gradient, guidance=guidance, through_unet=settings.gradient == "unet", cfg=guided)
    if settings.refine_steps:
        found["pixel_gradient"] = partial(gradient, guidance=guidance.on_pixels(), shape=image)
    if settings.noise_edit_steps:  # on the latent path the UNet is called without a gradient, which takes no more
        initial = settings.classifier_free(0, len(synthesis.table))
        found["noise_edit"] = partial(gradient, guidance=guidance.statistics_alone(), through_unet=True, cfg=initial)
    return found
