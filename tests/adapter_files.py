"""LoRA weights and tokens of textual inversion for the reduced priors, as their trainers save them."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny_priors import WIDTH

LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


def save_lora(folder: Path, prior_folder: Path, pipeline: Any, part: str = "unet", text: bool = True) -> Path:
    """LoRA weights of rank 2 for a denoiser and its first text encoder, as a trainer saves them."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if part == "transformer" else {}
    pipe = DiffusionPipeline.from_pretrained(prior_folder, **absent)
    networks = {part: (getattr(pipe, part), LAYERS)}
    if text:
        networks["text_encoder"] = (pipe.text_encoder, ["q_proj", "v_proj"])
    layers = {}
    generator = torch.Generator().manual_seed(0)
    for name, (network, targets) in networks.items():
        network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets))
        weights = get_peft_model_state_dict(network)
        layers[f"{name}_lora_layers"] = {
            key: torch.randn(value.shape, generator=generator) / 4 for key, value in weights.items()
        }
    pipeline.save_lora_weights(folder, **layers)
    return folder


def save_token(file: Path, token: str = "<toy>", rows: int = 1, width: int = WIDTH, **more: Tensor) -> Path:
    """Embeddings of a word, as diffusers' trainer of textual inversion saves them; more: entries beside it."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(rows, width, generator=generator)
    save_file({token: embeddings if rows > 1 else embeddings[0]} | more, file)
    return file
