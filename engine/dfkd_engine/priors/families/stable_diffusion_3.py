"""Stable Diffusion 3 and 3.5: a transformer that reads text and latents together (arXiv 2403.03206)."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from dfkd_engine.priors.families.family import Family, times
from dfkd_engine.priors.families.text import TextEncoder
from dfkd_engine.priors.folder import PriorFolder

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
T5_LENGTH = 256  # tokens; diffusers' max_sequence_length, which the model card's examples keep


class StableDiffusion3(Family):
    """context [B, L, D]: of two CLIPs the hidden state before the last, side by side and filled up with zeros, and
    behind them T5's; zeros where it was left out of the folder, as the authors allow. pooled [B, P]: the text
    embeddings of both CLIPs.
    """

    name = "Stable Diffusion 3"
    part, denoiser, vaes = "transformer", "SD3Transformer2DModel", ("AutoencoderKL", "AutoencoderTiny")
    requires = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    texts = True
    prompt = "a photo of a {label}"

    def __init__(self, config: Mapping[str, Any], clips: Sequence[TextEncoder], t5: TextEncoder | None) -> None:
        super().__init__(config)
        self.clips, self.t5, self.width = clips, t5, config.get("joint_attention_dim", 4096)
        self.readers = [*clips, *([t5] if t5 else [])]
        self.encoders = dict(zip(ENCODERS, (text.network for text in self.readers), strict=False))
        self.inputs, self.cfg = ("context", "pooled"), "rows"
        self.multiple = config.get("patch_size", 2)
        self.largest = self.multiple * config.get("pos_embed_max_size", 96)

    @classmethod
    def load(cls, folder: PriorFolder, dtype: torch.dtype, device: torch.device | str) -> Self:
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        clips = [
            TextEncoder(
                folder.load(CLIPTextModelWithProjection, encoder, dtype=dtype).to(device),
                folder.load_tokenizer(CLIPTokenizer, tokenizer),
                lambda outputs: (outputs.hidden_states[-2], outputs.text_embeds),
            )
            for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
        ]
        t5 = None
        if "text_encoder_3" in folder.configs:
            folder.require("text_encoder_3", "tokenizer_3")
            t5 = TextEncoder(
                folder.load(T5EncoderModel, "text_encoder_3", dtype=dtype).to(device),
                folder.load_tokenizer(T5TokenizerFast, "tokenizer_3"),
                lambda outputs: (outputs.last_hidden_state,),
                T5_LENGTH,
            )
        cls._check(folder, clips, t5)
        return cls(folder.configs[cls.part], clips, t5)

    @classmethod
    def _check(cls, folder: PriorFolder, clips: Sequence[TextEncoder], t5: TextEncoder | None) -> None:
        config = folder.configs[cls.part]
        width, both = config.get("joint_attention_dim", 4096), sum(clip.width for clip in clips)
        if both > width or (t5 is not None and t5.width != width):
            made = f"{both} of both CLIPs" + (f" and {t5.width} of T5" if t5 else "")
            raise cls.refuse(folder, f"transformer's joint_attention_dim is {width}", f"its text encoders make {made}")
        pooled = config.get("pooled_projection_dim", 2048)
        made = sum(clip.network.config.projection_dim for clip in clips)
        if made != pooled:
            raise cls.refuse(
                folder, f"transformer's pooled_projection_dim is {pooled}", f"its text encoders make {made}"
            )

    def conditions(self, prompts: Sequence[str], side: int, cfg: float) -> tuple[Tensor, ...]:
        encoded = [self._encode(prompt) for prompt in prompts]
        context, pooled = (torch.cat(tensors) for tensors in zip(*encoded, strict=True))
        return context, pooled

    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        hidden, pooled = zip(*(clip(prompt) for clip in self.clips), strict=True)
        clips = torch.cat(hidden, -1)
        t5 = clips.new_zeros(1, T5_LENGTH, self.width) if self.t5 is None else self.t5(prompt)[0]
        return torch.cat([pad(clips, (0, self.width - clips.shape[-1])), t5], 1), torch.cat(pooled, -1)

    def predict(self, denoiser: Any, z: Tensor, t: Tensor | float, *conditions: Tensor) -> Tensor:
        context, pooled = conditions
        output: Tensor = denoiser(
            z, timestep=times(t, z), encoder_hidden_states=context, pooled_projections=pooled
        ).sample
        return output

    def pipeline(self, denoiser: Any) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

        first, second = self.clips
        return StableDiffusion3Pipeline(
            transformer=denoiser,
            scheduler=FlowMatchEulerDiscreteScheduler(),  # any: it is not run
            vae=None,
            text_encoder=first.network,
            tokenizer=first.tokenizer,
            text_encoder_2=second.network,
            tokenizer_2=second.tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )

    def to(self, device: torch.device | str) -> None:
        for text in self.readers:
            text.to(device)
