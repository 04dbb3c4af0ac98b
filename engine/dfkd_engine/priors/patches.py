"""Patches: an exact autoencoder without weights, for small images whose denoiser need not see every pixel by itself.

    z = s unpatch(x)    image x [B, 3, H, W] in -1..1 <-> latents z [B, 3 p p, H / p, W / p], whose entry
                        c p p + i p + j is the pixel (i, j) of a patch of p x p in channel c (torch's pixel_unshuffle)

It stands where a VAE of diffusers would, with the same calls. s = 2 brings pixels to about unit deviation.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

SCALE = 2.0


class Patches(nn.Module):
    """patch_size: p, a power of two from 2 on; ValueError for others."""

    like: Tensor

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        if type(patch_size) is not int or patch_size < 2 or patch_size & (patch_size - 1):
            raise ValueError(f"a patch of {patch_size!r}: its side is a power of two from 2 on")
        self.patch_size = patch_size
        levels = (0,) * patch_size.bit_length()  # as a VAE states that it divides the side by p
        self.config = _Config(scaling_factor=SCALE, block_out_channels=levels, latent_channels=3 * patch_size**2)
        self.encoder, self.decoder = nn.PixelUnshuffle(patch_size), nn.PixelShuffle(patch_size)
        self.register_buffer("like", torch.empty(0), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in, which `to` and `double` change."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    def encode(self, images: Tensor) -> SimpleNamespace:
        """Images [B, 3, H, W] -> .latents, not scaled."""
        return SimpleNamespace(latents=self.encoder(images))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """Latents, not scaled -> images [B, 3, H, W] as .sample."""
        return SimpleNamespace(sample=self.decoder(latents))


class _Config(dict[str, Any]):
    """Entries as attributes too, as configs of diffusers have them."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]
