"""The published loop (DiffDFKD, arXiv 2504.00870) as a user of diffusers writes it: one image at a time, by autograd.

    m     = m_u + w (m_c - m_u)                         one UNet call of two rows
    z0hat = the scheduler's clean estimate of z and m
    x     = clamp(D(z0hat / s) / 2 + 1/2, 0, 1)
    L     = bn L_bn(x) + cls CE(T(x), y)                L_bn of hooks on the teacher's BatchNorm layers
    z     <- z - eta g / rms(g),  g = dL/dz             through teacher, decoder and UNet
    z     <- scheduler.step(m again, on the new z)      in every step

The honest baseline of bench_sampling: the networks' own modules with their weights in the order of NCHW, a scheduler of
diffusers, and nothing of dfkd's sampler, guidance or statistics, so that these can be compared with it. The length of a
step is measured in the gradient's rms, as in the `demo` preset.
"""

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn

from dfkd.synthesis.pipeline import GuidedPipeline

# What its settings have to be, by flat name of GenerateConfig; free are the lengths, weights, steps and prompts.
SETTINGS: dict[str, Any] = {
    "gradient": "unet",
    "bn_stats": "image",
    "adv_weight": 0.0,
    "loss": (),
    "guidance_repeats": 1,
    "guidance_norm": "rms",
    "guide_from": 0.0,
    "guide_to": 1.0,
    "cfg_from": 0.0,
    "cfg_to": 1.0,
    "refine_steps": 0,
    "noise_edit_steps": 0,
    "cutmix_every": 0,
}


@dataclass(frozen=True)
class PublishedLoop:
    """unet, vae: frozen, in evaluation mode, of one dtype. teacher: too, of its own. scheduler: steps are set.

    mean, std: of the teacher's images in 0..1, [1, 3, 1, 1]. side: of its images in pixels.
    bn_loss: "norm" or "relative", see `bn_loss` below.
    """

    unet: Any  # UNet2DConditionModel
    vae: Any  # AutoencoderKL
    scheduler: Any  # DDIMScheduler
    teacher: nn.Module
    mean: Tensor
    std: Tensor
    side: int
    cfg: float
    guidance_step: float
    bn_weight: float
    cls_weight: float
    bn_loss: str
    _features: list[tuple[nn.BatchNorm2d, Tensor]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        for layer in self.teacher.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_pre_hook(partial(_keep, self._features))

    @classmethod
    def of(cls, pipe: GuidedPipeline) -> "PublishedLoop":
        """The loop with a pipeline's settings, on copies of its networks in the order of NCHW.

        Raises ValueError: settings or sampler are not those of the published loop.
        """
        given = pipe.config.flat()
        if other := [f"{name} {given[name]}" for name, value in SETTINGS.items() if given[name] != value]:
            raise ValueError(f"these are not the published settings: {', '.join(other)}")
        if pipe.teacher.resize != "published" and pipe.teacher.input_size != pipe.image_size:
            raise ValueError(f"the teacher is shown the images by {pipe.teacher.resize}, and not as published")
        scheduler = DDIMScheduler.from_config(pipe.prior.scheduler_config)
        scheduler.set_timesteps(len(pipe.table), device=pipe.device)
        if given["sampler"] != "ddim" or scheduler.timesteps.tolist() != pipe.table.timesteps.tolist():
            raise ValueError("the pipeline samples by another sampler than DDIM")
        networks = pipe.prior.denoiser, pipe.prior.vae, pipe.teacher.module
        unet, vae, teacher = (copy.deepcopy(n).to(memory_format=torch.contiguous_format) for n in networks)
        like = next(teacher.parameters())
        mean, std = (like.new_tensor(values).view(1, 3, 1, 1) for values in (pipe.teacher.mean, pipe.teacher.std))
        numbers = [given[name] for name in ("cfg", "guidance_step", "bn_weight", "cls_weight", "bn_loss")]
        return cls(unet, vae, scheduler, teacher, mean, std, pipe.teacher.input_size, *numbers)

    @torch.enable_grad()
    def __call__(self, noise: Tensor, label: int, prompt: Tensor, negative: Tensor) -> Tensor:
        """noise [1, C, h, w], the class, and embeddings [1, L, D] of both prompts -> the image [1, 3, H, W] in 0..1."""
        embeddings = torch.cat([negative, prompt])
        z = noise * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            z = z.detach().requires_grad_()
            clean = self.scheduler.step(self.predict(z, t, embeddings), t, z).pred_original_sample
            (g,) = torch.autograd.grad(self.loss(self.decode(clean), label), z)
            with torch.no_grad():
                z = z - self.guidance_step * g / g.square().mean().sqrt()
                z = self.scheduler.step(self.predict(z, t, embeddings), t, z).prev_sample
        with torch.no_grad():
            return self.decode(z)

    def predict(self, z: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        """z [1, C, h, w] at timestep t -> what the UNet predicts there, with classifier-free guidance."""
        free, prompted = self.unet(torch.cat([z, z]), t, encoder_hidden_states=embeddings).sample.chunk(2)
        return free + self.cfg * (prompted - free)

    def decode(self, z: Tensor) -> Tensor:
        """Latents [1, C, h, w] -> images [1, 3, H, W] in 0..1."""
        return (self.vae.decode(z / self.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)

    def loss(self, images: Tensor, label: int) -> Tensor:
        """The guidance loss of an image [1, 3, H, W], a scalar."""
        self._features.clear()
        images = images.to(self.mean.dtype)
        if images.shape[-1] != self.side:
            images = F.interpolate(images, size=[self.side, self.side], mode="bicubic", align_corners=False)
        logits = self.teacher((images - self.mean) / self.std)
        target = torch.tensor([label], device=logits.device)
        bn = bn_loss(self._features, self.bn_loss)
        return self.cls_weight * F.cross_entropy(logits, target) + self.bn_weight * bn


def bn_loss(features: list[tuple[nn.BatchNorm2d, Tensor]], kind: str) -> Tensor:
    """How far an image's statistics in the inputs [1, C, H, W] of BatchNorm layers lie from the running ones: a scalar.

    norm      sum over layers of ||var - rvar||_2 + ||mean - rmean||_2, norms over channels (the published one)
    relative  mean over layers and channels of ((mean - rmean) / rstd)^2 + (std / rstd - 1)^2
    """
    terms = []
    for layer, x in features:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        if kind == "norm":
            terms.append(torch.linalg.norm(var - layer.running_var) + torch.linalg.norm(mean - layer.running_mean))
        else:
            std, rstd = (var + layer.eps).sqrt(), (layer.running_var + layer.eps).sqrt()
            terms.append((((mean - layer.running_mean) / rstd).square() + (std / rstd - 1).square()).mean())
    total = torch.stack(terms)
    return total.sum() if kind == "norm" else total.mean()


def _keep(features: list[tuple[nn.BatchNorm2d, Tensor]], layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
    features.append((layer, inputs[0]))
