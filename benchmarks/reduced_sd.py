"""A pipeline folder with the layers of Stable Diffusion 1.5 and fewer channels, weights random: what commands can load.

Its tokenizer, text encoder and scheduler are the embedded prior's, so that a run takes prompts as it would of others.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig

from benchmarks import sd15
from dfkd.cli.generate_options import EMBEDDED_PRIOR

UNET = {"block_out_channels": (64, 128, 256, 256)}
VAE = {"block_out_channels": (32, 64, 128, 128)}


def write_pipeline(folder: Path, size: int, unet: dict[str, Any] = UNET, vae: dict[str, Any] = VAE) -> Path:
    """size: of its images. unet, vae: entries of the configs that differ from the original's."""
    for part in ("tokenizer", "text_encoder", "scheduler"):
        shutil.copytree(EMBEDDED_PRIOR / part, folder / part)
    shutil.copy(EMBEDDED_PRIOR / "model_index.json", folder)
    width = CLIPTextConfig.from_pretrained(folder / "text_encoder").hidden_size
    factor = 2 ** (len(sd15.VAE["block_out_channels"]) - 1)
    networks = {
        "unet": lambda: UNet2DConditionModel(
            **sd15.UNET | unet | {"cross_attention_dim": width, "sample_size": size // factor}
        ),
        "vae": lambda: AutoencoderKL(**sd15.VAE | vae | {"sample_size": size}),
    }
    for seed, (part, make) in enumerate(networks.items()):
        sd15.random(make, torch.float32, seed).save_pretrained(folder / part)
    return folder
