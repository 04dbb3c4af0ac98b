"""Configurations of Stable Diffusion 1.5's networks at their published width, and of the tiny decoder made for it."""

from tests.tiny_sd import UNET, VAE

SD15 = UNET | {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
SD15_VAE = VAE | {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
TINY = {"_class_name": "AutoencoderTiny", "decoder_block_out_channels": (64, 64, 64, 64)}
