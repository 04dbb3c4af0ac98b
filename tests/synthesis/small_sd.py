"""A prior in Stable Diffusion's format for tests of many cases: 8x8 latents, 16x16 images, hundredths of a second."""

from pathlib import Path

from tests.tiny_sd import make_tiny_sd

UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "sample_size": 8,
}
VAE = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 16,
    "scaling_factor": 1.0,  # the decoder is not trained: latents of unit size give it pixels that differ
}


def make_small_sd(folder: Path, seed: int = 0) -> Path:
    return make_tiny_sd(folder, seed=seed, unet=UNET, vae=VAE, text_encoder={"num_hidden_layers": 1})
