"""Stable Diffusion XL, SDXL-Turbo: a UNet that attends to two text encoders, and is told sizes (arXiv 2307.01952)."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from dfkd_engine.priors.families.family import Family
from dfkd_engine.priors.families.stable_diffusion import guidance_embedding
from dfkd_engine.priors.families.text import TextEncoder
from dfkd_engine.priors.folder import PriorFolder


class StableDiffusionXL(Family):
    """context [B, L, D]: of both encoders the hidden state before the last, side by side. pooled [B, P]: the second
    one's text embedding. sizes [B, 6]: the image's original (h, w), the crop's (top, left), the wanted (h, w), which
    are the image's own and 0. guidance [B, G]: of a latent consistency model.
    """

    name = "Stable Diffusion XL"
    part, denoiser, vaes = "unet", "UNet2DConditionModel", ("AutoencoderKL", "AutoencoderTiny")
    requires = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    texts = True
    prompt = "a photo of a {label}"
    upcasts = True  # its VAE's activations leave float16's range

    def __init__(self, config: Mapping[str, Any], first: TextEncoder, second: TextEncoder, zeros: bool) -> None:
        super().__init__(config)
        self.first, self.second, self.facts = first, second, {"zeros": zeros}
        self.readers = (first, second)
        self.encoders = {"text_encoder": first.network, "text_encoder_2": second.network}
        self.guidance = config.get("time_cond_proj_dim")
        self.inputs = ("context", "pooled", "sizes") + (() if self.guidance is None else ("guidance",))
        self.cfg = "rows" if self.guidance is None else "input"

    @classmethod
    def takes(cls, folder: PriorFolder) -> bool:
        return folder.configs[cls.part].get("addition_embed_type") == "text_time"

    @classmethod
    def load(cls, folder: PriorFolder, dtype: torch.dtype, device: torch.device | str) -> Self:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        if folder.configs["vae"].get("latents_mean") is not None:
            raise cls.refuse(folder, "vae has a latents_mean", "its latents are scaled channel by channel")
        first = TextEncoder(
            folder.load(CLIPTextModel, "text_encoder", dtype=dtype).to(device),
            folder.load_tokenizer(CLIPTokenizer, "tokenizer"),
            lambda outputs: (outputs.hidden_states[-2],),
        )
        second = TextEncoder(
            folder.load(CLIPTextModelWithProjection, "text_encoder_2", dtype=dtype).to(device),
            folder.load_tokenizer(CLIPTokenizer, "tokenizer_2"),
            lambda outputs: (outputs.hidden_states[-2], outputs.text_embeds),
        )
        cls._check(folder, first, second)
        zeros = bool(folder.configs["model_index"].get("force_zeros_for_empty_prompt", True))
        return cls(folder.configs[cls.part], first, second, zeros)

    @classmethod
    def _check(cls, folder: PriorFolder, first: TextEncoder, second: TextEncoder) -> None:
        config = folder.configs[cls.part]
        context, width = config.get("cross_attention_dim", 1280), first.width + second.width
        if ({context} if isinstance(context, int) else set(context)) != {width}:
            why = f"its text encoders make embeddings of width {width} together"
            raise cls.refuse(folder, f"unet's cross_attention_dim is {context}", why)
        added = config.get("projection_class_embeddings_input_dim")
        wanted = 6 * (config.get("addition_time_embed_dim") or 0) + second.network.config.projection_dim
        if added != wanted:
            fact = f"unet's projection_class_embeddings_input_dim is {added}"
            raise cls.refuse(folder, fact, f"six sizes and its second text encoder's embedding make {wanted}")

    def conditions(self, prompts: Sequence[str], side: int, cfg: float) -> tuple[Tensor, ...]:
        encoded = [self._encode(prompt) for prompt in prompts]
        context, pooled = (torch.cat(tensors) for tensors in zip(*encoded, strict=True))
        return context, pooled, *self._told(side, cfg, context)

    def unconditional(self, prompt: str, side: int) -> tuple[Tensor, ...]:
        """Conditions of the negative prompt; zeros for an empty one where the model was trained so, as in diffusers."""
        context, pooled, *told = self.conditions([prompt], side, 1.0)
        if prompt == "" and self.facts["zeros"]:
            context, pooled = torch.zeros_like(context), torch.zeros_like(pooled)
        return context, pooled, *told

    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        (first,), (second, pooled) = self.first(prompt), self.second(prompt)
        return torch.cat([first, second], -1), pooled

    def _told(self, side: int, cfg: float, context: Tensor) -> tuple[Tensor, ...]:
        """sizes and, where the network takes it, guidance, for the rows of `context`."""
        told = [context.new_tensor([[side, side, 0, 0, side, side]])]
        if self.guidance is not None:
            told.append(guidance_embedding(cfg, self.guidance).to(context))
        return tuple(tensor.expand(len(context), -1) for tensor in told)

    def predict(self, denoiser: Any, z: Tensor, t: Tensor | float, *conditions: Tensor) -> Tensor:
        context, pooled, sizes, *guidance = conditions
        output: Tensor = denoiser(
            z,
            t,
            encoder_hidden_states=context,
            timestep_cond=guidance[0] if guidance else None,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
        ).sample
        return output

    def pipeline(self, denoiser: Any) -> Any:
        from diffusers import DDIMScheduler, StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(
            vae=None,
            text_encoder=self.first.network,
            text_encoder_2=self.second.network,
            tokenizer=self.first.tokenizer,
            tokenizer_2=self.second.tokenizer,
            unet=denoiser,
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),  # any: it is not run
            add_watermarker=False,
        )

    def to(self, device: torch.device | str) -> None:
        self.first.to(device)
        self.second.to(device)
