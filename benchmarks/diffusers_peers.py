"""Plain diffusers as a peer: its StableDiffusionPipeline, eager and compiled, on networks that our sampler has too.

eager      the pipeline as it comes: DDIM, classifier-free guidance, prompts already encoded, no safety checker
compiled   the same by the recipe of diffusers' documentation, page "Accelerate inference"
           (huggingface.co/docs/diffusers/optimization/fp16): channels_last, UNet and vae.decode through
           torch.compile with fullgraph, projections fused, and for "max-autotune" the page's settings of inductor

peer = of_prior(prior, scheduler_config)            or of_folder("dfkd/priors/demo", device, dtype)
images = peer(latents, context, empty, steps, cfg)
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from dfkd_engine.networks import Prior

MODES = ("max-autotune", "reduce-overhead", "default")  # of torch.compile; the first is the page's
TUNED = {
    "conv_1x1_as_mm": True,
    "coordinate_descent_tuning": True,
    "epilogue_fusion": False,
    "coordinate_descent_check_all_directions": True,
}


@dataclass(frozen=True)
class Peer:
    """pipeline: a StableDiffusionPipeline. inductor: settings of torch._inductor.config, in its calls alone."""

    pipeline: Any
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, latents: Tensor, context: Tensor, empty: Tensor, steps: int, cfg: float) -> Tensor:
        """Images in 0..1 [B, 3, H, W] in the networks' dtype.

        latents: the first noise [B, C, h, w]; context: prompt embeddings [B, L, D]; empty: of no prompt, [1, L, D].
        """
        dtype, factor = self.pipeline.unet.dtype, self.pipeline.vae_scale_factor
        with torch._inductor.config.patch(dict(self.inductor)):
            found: Tensor = self.pipeline(
                height=factor * latents.shape[2],
                width=factor * latents.shape[3],
                prompt_embeds=context.to(dtype),
                negative_prompt_embeds=empty.expand_as(context).to(dtype),
                latents=latents.to(dtype),
                num_inference_steps=steps,
                guidance_scale=cfg,
                output_type="pt",
            ).images
        return found


def of_prior(prior: Prior, scheduler_config: Mapping[str, Any]) -> Peer:
    """The pipeline around the networks of `prior` themselves, in their dtype and memory format."""
    pipeline = StableDiffusionPipeline(
        unet=prior.unet,
        vae=prior.vae,
        text_encoder=prior.text_encoder,
        tokenizer=prior.tokenizer,
        scheduler=DDIMScheduler.from_config(dict(scheduler_config)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _quiet(pipeline)


def of_folder(folder: str | Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Peer:
    """The pipeline of a folder that diffusers wrote, with DDIM in the place of its scheduler."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipeline.to(device, dtype)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return _quiet(pipeline)


def compiled(peer: Peer, mode: str = MODES[0]) -> Peer:
    """The same on copies of the networks; `mode` of MODES. It compiles at its first call, and for each batch anew."""
    plain = peer.pipeline
    parts = {name: part for name, part in plain.components.items() if name not in ("unet", "vae")}
    unet, vae = (
        copy.deepcopy(network).to(memory_format=torch.channels_last) for network in (plain.unet, plain.vae)
    )  # fusing and compiling change them
    pipeline = type(plain)(unet=unet, vae=vae, **parts, requires_safety_checker=False)
    pipeline.fuse_qkv_projections(vae=_has_attention(vae))
    pipeline.unet = torch.compile(unet, mode=mode, fullgraph=True)
    vae.decode = torch.compile(vae.decode, mode=mode, fullgraph=True)
    return replace(_quiet(pipeline), inductor=TUNED if mode == "max-autotune" else {})


def _quiet(pipeline: Any) -> Peer:
    pipeline.set_progress_bar_config(disable=True)
    return Peer(pipeline)


def _has_attention(vae: nn.Module) -> bool:
    """AutoencoderTiny has none to fuse, and no method for it."""
    return hasattr(vae, "fuse_qkv_projections")
