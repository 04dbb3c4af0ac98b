"""Noise + pixel steps: what is left of unguided samples with refined pixels once the diffusion is taken out.

dfkd-generate --method benchmarks/quality/noise_pixels.py:NoisePixels --refine-steps 60 ...
"""

from torch import Tensor

from dfkd.data import Record
from dfkd.synthesis.pack import Pack
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd_kernels.philox import philox_uniform

NOISE = 0  # Philox stream: of a method that samples nothing else


class NoisePixels(GuidedPipeline):
    """Uniform noise [3, H, W] in 0..1 for each image, then --refine-steps as guided diffusion takes them."""

    name = "noise_pixels"

    def finished(self, pack: Pack) -> tuple[Tensor, list[Record]]:
        """A pack's images from noise, uint8 [B, 3, H, W] on the CPU, and their records; the prior is not asked."""
        noise = philox_uniform(pack.seed, pack.ids, NOISE, (3, self.image_size, self.image_size))
        return self.stored(pack, noise, self._refined(pack, noise))
