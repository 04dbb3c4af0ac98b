"""A Stable Diffusion 1.5 pipeline of reduced width with random weights, written to a folder as diffusers writes it."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 32  # of the text embeddings; 768 in the original

UNET: dict[str, Any] = {  # unet/config.json of Stable Diffusion 1.5; thinned: block_out_channels, cross_attention_dim
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": (32, 32, 64, 64),
    "center_input_sample": False,
    "cross_attention_dim": WIDTH,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
VAE: dict[str, Any] = {  # thinned: block_out_channels, layers_per_block (2), norm_num_groups (32)
    "act_fn": "silu",
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TINY_VAE: dict[str, Any] = {  # an AutoencoderTiny of the same latents and sizes
    "encoder_block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "num_encoder_blocks": (1, 1, 1, 1),
    "num_decoder_blocks": (1, 1, 1, 1),
}
TEXT: dict[str, Any] = {  # thinned: everything but the activation, the norm and the number of positions
    "hidden_act": "quick_gelu",
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
SCHEDULER: dict[str, Any] = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer of letters, digits and a handful of merges, from vocab.json and merges.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = "abcdefghijklmnopqrstuvwxyz0123456789.,-'"
    merges = [("a", "n</w>"), ("o", "f</w>"), ("p", "h"), ("ph", "o"), ("t", "o</w>"), ("pho", "to</w>")]
    words = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]  # CLIP's own are the last two as well
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def make_tiny_sd(folder: Path, *, seed: int = 0, vae_class: type = AutoencoderKL, **overrides: dict[str, Any]) -> Path:
    """Write the pipeline to `folder` and return it; diffusers' StableDiffusionPipeline.from_pretrained loads it.

    overrides: config entries to change, by part: unet={...}, vae={...}, text_encoder={...}, scheduler={...}.
    vae_class: AutoencoderKL or AutoencoderTiny.
    """
    unknown = overrides.keys() - {"unet", "vae", "text_encoder", "scheduler"}
    if unknown:
        raise TypeError(f"unknown parts {sorted(unknown)}")
    tokenizer = write_tokenizer(folder / "tokenizer")
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = TEXT | special | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    vae = TINY_VAE if vae_class is AutoencoderTiny else VAE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            unet=UNet2DConditionModel(**(UNET | overrides.get("unet", {}))),
            vae=vae_class(**(vae | overrides.get("vae", {}))),
            text_encoder=CLIPTextModel(CLIPTextConfig(**(text | overrides.get("text_encoder", {})))),
            tokenizer=tokenizer,
            scheduler=PNDMScheduler(**(SCHEDULER | overrides.get("scheduler", {}))),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder
