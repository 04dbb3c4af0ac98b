"""Clean estimates of latents along unguided trajectories: what a guidance gradient meets, without a teacher or data."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfkd.config import SamplingConfig
from dfkd.errors import UsageError
from dfkd.synthesis.checks import cfg_of, latent_size, patches_of
from dfkd.synthesis.pack import INITIAL_NOISE
from dfkd.synthesis.prompts import prompt_of
from dfkd.synthesis.sampler import sample
from dfkd.synthesis.schedule import build_table
from dfkd_engine.priors.prior import Prior
from dfkd_kernels.philox import philox_normal


class Trajectories:
    """Unguided trajectories of a prior, of which each image's follows from seed and id.

    prior: on its device. sampling: size, steps, scale of classifier-free guidance, prompt, negative prompt. words: for
    {label}, taken in turn by id; () takes those that the prior states.
    Raises UsageError: the settings do not fit the prior, or there are no words for {label}.
    """

    def __init__(self, prior: Prior, sampling: SamplingConfig, words: Sequence[str] = ()) -> None:
        self.prior, self.sampling = prior, sampling
        self.latent_size, self.cfg = latent_size(sampling.size, prior), cfg_of(sampling, prior)
        self.image_size = self.latent_size[0] * prior.vae_scale_factor
        tokens = patches_of(prior, self.latent_size)
        self.table = build_table(
            prior.scheduler_config, sampling.sampler, sampling.steps, pixels=prior.pixels, tokens=tokens
        )
        template = prior.prompt if sampling.prompt is None else sampling.prompt
        words = tuple(words) or prior.labels or tuple(prior.family.facts.get("classes", ()))
        if "{label}" in template and not words:
            todo = "name some with --classes, or give a --prompt without {label}"
            raise UsageError(f"the prompt {template!r} has no words for {{label}}", "the prior states none", todo)
        self.prompts = [prompt_of(template, word) for word in words] if "{label}" in template else [template]
        prior.family.check(self.prompts)

    @torch.no_grad()
    def estimates(self, ids: Tensor, seed: int, kept: Tensor) -> Tensor:
        """Clean estimates z0hat [B, K, C, h, w], float32, of the images `ids`, int64 [B], at their steps `kept`,
        int64 [B, K], of the table."""
        prior, device = self.prior, self.prior.device
        prompts = [self.prompts[i % len(self.prompts)] for i in ids.tolist()]
        told = prior.conditions(prompts, self.image_size, self.cfg)
        free = prior.unconditional(self.sampling.negative_prompt, self.image_size) if self._rows(0) == 2 else ()
        times = self.table.timesteps.to(device, torch.float32)
        noisy = [noise != 0 for noise in self.table.step_noise.tolist()]
        ids = ids.to(device)
        shape = (prior.latent_channels, *self.latent_size)
        z = self.table.init_scale * philox_normal(seed, ids, INITIAL_NOISE, shape)
        found = torch.empty(len(ids), kept.shape[1], *shape, device=device)

        def denoise(z: Tensor, i: int, images: Tensor | None = None) -> Tensor:
            rows, given = z, list(told)
            if self._rows(i) == 2:
                untold = [tensor.expand_as(own) for tensor, own in zip(free, told, strict=True)]
                rows, given = torch.cat([z] * 2), [torch.cat(pair) for pair in zip(untold, told, strict=True)]
            return torch.unflatten(prior.denoise(rows, times[i], *given), 0, (self._rows(i), -1))

        def after(i: int, z: Tensor, z0: Tensor) -> tuple[Tensor, Tensor]:
            row, column = (kept == i).nonzero(as_tuple=True)
            found[row.to(device), column.to(device)] = z0[row.to(device)]
            return z, z0

        sample(
            z,
            self.table.coefficients(z, self.cfg),
            denoise,
            lambda point, i, to_latent=None: torch.zeros_like(point),
            repeats=lambda i: 0,
            noise=lambda i: (seed, ids, 1 + i) if noisy[i] else None,
            after=after,
            clip=self.table.clip,
        )
        return found

    def _rows(self, step: int) -> int:
        return 2 if self.prior.family.cfg == "rows" and self.sampling.cfg_acts(step, self.cfg) else 1
