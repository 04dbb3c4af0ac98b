"""Stable Diffusion 1 and 2, SD-Turbo, and latent consistency models: a UNet that attends to one text encoder.

A latent consistency model (arXiv 2310.04378) takes the scale of classifier-free guidance as an input, `guidance`, which
its time embedding is shifted by: it needs no unconditional row.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from dfkd_engine.priors.families.family import Family
from dfkd_engine.priors.families.text import TextEncoder
from dfkd_engine.priors.folder import PriorFolder

# Inputs that a UNet2DConditionModel may want beside latents, time and text, each with the option that says so.
_UNMET = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type")


class StableDiffusion(Family):
    """context [B, L, D]: the text encoder's last hidden state. guidance [B, G]: of a latent consistency model."""

    name = "Stable Diffusion"
    part, denoiser, vaes = "unet", "UNet2DConditionModel", ("AutoencoderKL", "AutoencoderTiny")
    requires = ("vae", "text_encoder", "tokenizer")
    texts = True
    prompt = "a photo of a {label}"  # the template of CLIP's authors, which suits any photo prior

    def __init__(self, config: Mapping[str, Any], text: TextEncoder) -> None:
        super().__init__(config)
        self.text, self.readers, self.encoders = text, (text,), {"text_encoder": text.network}
        self.guidance = config.get("time_cond_proj_dim")
        self.inputs = ("context",) if self.guidance is None else ("context", "guidance")
        self.cfg = "rows" if self.guidance is None else "input"

    @classmethod
    def load(cls, folder: PriorFolder, dtype: torch.dtype, device: torch.device | str) -> Self:
        from transformers import CLIPTextModel, CLIPTokenizer

        config = folder.configs[cls.part]
        architectures = folder.configs["text_encoder"].get("architectures") or ["CLIPTextModel"]
        if architectures != ["CLIPTextModel"]:
            raise cls.refuse(folder, f"text_encoder is a {', '.join(architectures)}", "want a CLIPTextModel")
        for option in _UNMET:
            if config.get(option) is not None:
                fact = f"unet has {option} = {config[option]}"
                raise cls.refuse(folder, fact, "it wants inputs beside latents, time and text")
        tokenizer = folder.load_tokenizer(CLIPTokenizer, "tokenizer")
        network = folder.load(CLIPTextModel, "text_encoder", dtype=dtype).to(device)
        text = TextEncoder(network, tokenizer, last_hidden_state)
        context = config.get("cross_attention_dim", 1280)
        if ({context} if isinstance(context, int) else set(context)) != {text.width}:
            why = f"its text encoder makes embeddings of width {text.width}"
            raise cls.refuse(folder, f"unet's cross_attention_dim is {context}", why)
        return cls(config, text)

    def conditions(self, prompts: Sequence[str], side: int, cfg: float) -> tuple[Tensor, ...]:
        context = torch.cat([self.text(prompt)[0] for prompt in prompts])
        if self.guidance is None:
            return (context,)
        embedded = guidance_embedding(cfg, self.guidance).to(context)
        return context, embedded.expand(len(prompts), -1)

    def predict(self, denoiser: Any, z: Tensor, t: Tensor | float, *conditions: Tensor) -> Tensor:
        context, *guidance = conditions
        shift = guidance[0] if guidance else None
        output: Tensor = denoiser(z, t, encoder_hidden_states=context, timestep_cond=shift).sample
        return output

    def pipeline(self, denoiser: Any) -> Any:
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=None,
            text_encoder=self.text.network,
            tokenizer=self.text.tokenizer,
            unet=denoiser,
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),  # any: it is not run
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def to(self, device: torch.device | str) -> None:
        self.text.to(device)


def last_hidden_state(outputs: Any) -> tuple[Tensor, ...]:
    """What Stable Diffusion takes of its text encoder's outputs: [1, L, D]."""
    return (outputs.last_hidden_state,)


def guidance_embedding(cfg: float, width: int) -> Tensor:
    """Sinusoids [1, width] of 1000 (cfg - 1), as latent consistency models were trained with (arXiv 2310.04378)."""
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000.0 * (cfg - 1) * rates[None]
    embedded = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.nn.functional.pad(embedded, (0, width % 2))
