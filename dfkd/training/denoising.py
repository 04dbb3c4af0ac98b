"""The loss of a diffusion model, and its samples: a denoiser with its conditions and noise levels as one module.

flow       z_t = (1 - t) z0 + t n, target n - z0, time 1000 t, logit t ~ N(log shift, 1)  arXiv:2403.03206
discrete   z_t = a_t z0 + s_t n, target n, a n - s z0 or z0, t stratified over 0..T-1   arXiv:2006.11239, 2202.00512
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

FLOW = "FlowMatchEulerDiscreteScheduler"
STEPS, CFG = 12, 2.0  # of a preview


class Denoising(nn.Module):
    """The mean squared error of a denoiser's answers at random noise levels.

    denoiser: UNet2DModel or UNet2DConditionModel. scheduler: of diffusers, the one that the prior is saved with.
    text_encoder: one that learns too; where there is none the denoiser's condition is given ready.
    forward(z0 [B, C, h, w], *condition) -> loss []. condition: class numbers int64 [B]; token ids int64 [B, L] with a
    text encoder, else embeddings [B, L, D]; none. Randomness comes from torch's generator of the device.
    """

    abar: Tensor

    def __init__(self, denoiser: nn.Module, scheduler: Any, text_encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.denoiser, self.text_encoder = denoiser, text_encoder
        self.flow = type(scheduler).__name__ == FLOW
        self.prediction = "flow" if self.flow else str(scheduler.config["prediction_type"])
        levels = torch.empty(0) if self.flow else scheduler.alphas_cumprod.float()
        self.register_buffer("abar", levels, persistent=False)
        self.centre = math.log(float(scheduler.config["shift"])) if self.flow else 0.0

    def forward(self, z0: Tensor, *condition: Tensor) -> Tensor:
        z0 = z0.float()
        noise = torch.randn_like(z0)
        time, alpha, sigma = self.levels(len(z0), z0.device)
        answer = self.predict(alpha * z0 + sigma * noise, time, *condition).float()
        if self.prediction == "flow":
            target = noise - z0
        elif self.prediction == "v_prediction":
            target = alpha * noise - sigma * z0
        else:
            target = noise if self.prediction == "epsilon" else z0
        return F.mse_loss(answer, target)

    def levels(self, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Random times [B] as the denoiser takes them, and alpha and sigma [B, 1, 1, 1] there."""
        if self.flow:
            t = (self.centre + torch.randn(count, device=device)).sigmoid()
            return 1000 * t, (1 - t).view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
        # Stratified: one time in each part of the schedule, a lower variance of the loss than independent ones.
        part = (torch.rand(1, device=device) + torch.arange(count, device=device)) / count
        time = (part * len(self.abar)).long().clamp(max=len(self.abar) - 1)
        abar = self.abar[time].view(-1, 1, 1, 1)
        return time, abar.sqrt(), (1 - abar).sqrt()

    def predict(self, z: Tensor, time: Tensor, *condition: Tensor) -> Tensor:
        """The denoiser's answer, like z. time: [B]."""
        z = z.contiguous(memory_format=torch.channels_last)
        if not condition:
            return self.denoiser(z, time).sample  # type: ignore[no-any-return]
        (given,) = condition
        if self.text_encoder is not None:
            given = self.text_encoder(given).last_hidden_state
        if given.ndim == 1:
            return self.denoiser(z, time, class_labels=given).sample  # type: ignore[no-any-return]
        return self.denoiser(z, time, encoder_hidden_states=given).sample  # type: ignore[no-any-return]


def attention_of(device: torch.device, amp: str) -> AbstractContextManager[None]:
    """The attention to train with: on a CPU under bf16 in plain products, since torch's fused kernel is slow backward.

    A step of the preset cifar10-prior takes a sixth less time so.
    """
    if device.type == "cpu" and amp == "bf16":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


@torch.no_grad()
def sample(
    denoising: Denoising,
    scheduler: Any,
    noise: Tensor,
    condition: Sequence[Tensor] = (),
    free: Sequence[Tensor] = (),
    steps: int = STEPS,
    cfg: float = CFG,
) -> Tensor:
    """Clean latents [B, C, h, w] from noise of that shape, by the scheduler's own steps (deterministic).

    condition, free: of these rows and of the rows that classifier-free guidance moves away from; without `free` there
    is none. cfg: its scale; 1 is the condition alone.
    """
    scheduler.set_timesteps(steps, device=noise.device)
    z = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    guided = bool(free) and cfg != 1
    rows = [torch.cat(pair) for pair in zip(condition, free, strict=True)] if guided else condition
    for t in scheduler.timesteps:
        inputs = torch.cat([z, z]) if guided else z
        answer = denoising.predict(inputs, t.to(noise).expand(len(inputs)), *rows).float()
        if guided:
            told, untold = answer.chunk(2)
            answer = untold + cfg * (told - untold)
        z = scheduler.step(answer, t, z).prev_sample
    return z
