"""What computes the gradient of guidance in a diffusers pipeline: autograd through its VAE, or a GuidedPipeline's own
guidance with the engines that were chosen for it.

Both are called with clean latents [B, C, h, w], labels int64 [B] and views [B, V] of views.py or None, on their device,
and return the gradient, like the latents, and the unweighted losses {name: [B]}.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfkd.compiled.choose import describe as describe_choices
from dfkd.errors import UsageError
from dfkd.runtime import choose_kernels
from dfkd.synthesis.batching import cuts
from dfkd.synthesis.checks import copy_student, try_teacher
from dfkd.synthesis.guidance import Guidance
from dfkd.synthesis.losses import GuidanceLoss
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd.synthesis.softplus import softened
from dfkd.teachers import Classifier


class AutogradGradient:
    """The gradient by autograd, wherever the diffusers pipeline is moved.

    Arguments as of `TeacherGuidance`. Raises UsageError: what `Guidance` and `try_teacher` refuse.
    """

    def __init__(
        self,
        teacher: Classifier,
        vae: Any,
        student: Classifier | None,
        losses: Sequence[GuidanceLoss],
        batch: int,
        softplus_beta: float = 0.0,
    ) -> None:
        self.softplus_beta = softplus_beta
        self.vae, self.losses, self.batch = vae and vae.requires_grad_(False), losses, batch
        device = torch.device("cpu") if vae is None else vae.device
        self.teacher = teacher.freeze(device).tried()
        self.student = student and copy_student(student, self.teacher)
        self._upcast: Any = None
        self._guidance = self._on(device)
        try_teacher(self.teacher, self._guidance, self.teacher.input_size)

    def __call__(self, clean: Tensor, labels: Tensor, view: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        if self._where != (clean.device, self.vae and self.vae.dtype):  # the pipeline was moved
            self._guidance = self._on(clean.device)
        return self._guidance.gradient(clean, labels, self.batch or len(clean), view=view)

    def side(self, clean: Tensor) -> int:
        """The side in pixels of the images of clean latents."""
        factor = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        return clean.shape[-1] * factor

    def require_fit(self, clean: Tensor) -> None:
        """Any latents that the VAE decodes will do."""

    def decode(self, z0: Tensor) -> Tensor:
        """Clean latents [B, C, h, w] -> images [B, 3, H, W] in 0..1, as the pipelines decode; differentiable."""
        if self.vae is None:
            return (z0 / 2 + 0.5).clamp(0, 1)
        vae, config = self._decoder(z0.device), self.vae.config
        latents = z0 / config.scaling_factor + (config.get("shift_factor") or 0.0)
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (z0.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
            latents = z0 * std / config.scaling_factor + mean
        decoded: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return (decoded.to(z0.dtype) / 2 + 0.5).clamp(0, 1)

    def describe(self) -> list[str]:
        return [f"kernels: {self._guidance.kernels}", "gradient: eager (autograd through the pipeline's VAE)"]

    def _on(self, device: torch.device) -> Guidance:
        """The gradient on this device, to which teacher and student follow the pipeline."""
        self._where = device, self.vae and self.vae.dtype
        self.teacher.freeze(device)
        if self.student is not None:
            self.student.freeze(device)
        narrow = self.vae is not None and self._decoder(device).dtype == torch.float16
        kernels = choose_kernels("auto", device).name
        teacher = softened(self.teacher, self.softplus_beta)
        return Guidance(self.decode, teacher, self.losses, self.student, narrow, kernels)

    def _decoder(self, device: torch.device) -> Any:
        """The VAE, or its float32 copy on this device where it is float16 and would overflow."""
        if self.vae.dtype != torch.float16 or not self.vae.config.get("force_upcast"):
            return self.vae
        if self._upcast is None:  # made anew: a copy would have the hooks of an offloaded one
            self._upcast = type(self.vae).from_config(self.vae.config)
            self._upcast.load_state_dict(self.vae.state_dict())
            self._upcast.eval().requires_grad_(False)
        return self._upcast.to(device)


class PipelineGradient:
    """The gradient as a GuidedPipeline computes it: by its engines where it has them, else by autograd.

    It is the pipeline's guidance as it is at the call, with a student that was updated and calls of its `call_size`.
    Latents enter in float32, as in its sampler.
    """

    def __init__(self, pipeline: GuidedPipeline) -> None:
        self.pipeline = pipeline

    def __call__(self, clean: Tensor, labels: Tensor, view: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        guidance, point = self._guidance, clean.float()
        size = self.pipeline.group if "group" in guidance.needs else len(point)
        batch, each = self.pipeline.call_size, cuts(len(point), size)
        parts = [
            guidance.gradient(point[cut], labels[cut], batch, view=None if view is None else view[cut]) for cut in each
        ]
        gradients, records = zip(*parts, strict=True)
        losses = {name: torch.cat([record[name] for record in records]) for name in records[0]}
        return torch.cat(gradients).to(clean), losses

    def side(self, clean: Tensor) -> int:
        """The side in pixels of the images of clean latents."""
        return self.pipeline.image_size

    def require_fit(self, clean: Tensor) -> None:
        """Raise UsageError for latents that are not those of the pipeline, or no whole groups of them."""
        pipe, rows = self.pipeline, len(clean)
        wanted, device = [pipe.prior.latent_channels, *pipe.latent_size], pipe.prior.device
        if list(clean.shape[1:]) != wanted:
            why = f"the guidance is of a GuidedPipeline whose latents are {wanted}"
            todo = f"draw images of {pipe.image_size} pixels (height=, width=), or give the GuidedPipeline another size"
            raise UsageError(f"latents of the shape {list(clean.shape[1:])}", why, todo)
        if clean.device != device:
            why = f"the guidance is of a GuidedPipeline on {device}, where its engines are"
            raise UsageError(f"latents on {clean.device}", why, f"use pipe.to({str(device)!r})")
        if "group" in self._guidance.needs and rows % pipe.group:
            why = f"their statistics are those of groups, which have {pipe.group} in the GuidedPipeline"
            todo = f"draw a multiple of {pipe.group}, or give the GuidedPipeline group={rows} or bn_stats='image'"
            raise UsageError(f"{rows} images in a call", why, todo)

    def decode(self, z0: Tensor) -> Tensor:
        """Clean latents [B, C, h, w] -> images [B, 3, H, W] in 0..1, as the teacher is shown them; differentiable."""
        return self._guidance.decode(z0)

    def describe(self) -> list[str]:
        """Kernels, and what computes each function of the gradient; the denoiser is the diffusers pipeline's own."""
        names = {choice.network for choice in self.pipeline.choices}
        # `gradient` decodes by itself, and guidance_decode in the place of decode
        aside = {"unet", "decode"} if names & {"gradient", "guidance_decode"} else {"unet"}
        choices = [choice for choice in self.pipeline.choices if choice.network not in aside]
        computed = describe_choices(choices) or ["gradient: eager (the GuidedPipeline has no engines)"]
        if "student" in self._guidance.needs:
            computed.append("gradient in the image: eager (the student is replaced between runs)")
        return [f"kernels: {self.pipeline.kernels}", *computed]

    @property
    def _guidance(self) -> Guidance:
        assert self.pipeline.guidance is not None, "TeacherGuidance.of refuses a pipeline without guidance"
        return self.pipeline.guidance
