"""Mixtures of the images of a batch; in distillation the teacher labels the mixture."""

import numpy as np
import torch
from torch import Generator, Tensor

from dfkd.data import coin


def mix(images: Tensor, kind: str, alpha: float, generator: Generator, total: int, rows: slice = slice(None)) -> Tensor:
    """Mixtures of each image [B, 3, H, W] with its neighbour in the batch, which the loader has shuffled.

    lam ~ Beta(alpha, alpha) for every image. kind: mixup: lam x + (1 - lam) x'; cutmix: a box of W sqrt(1 - lam) by
    H sqrt(1 - lam) with uniform centre, clipped at the border, comes from x'; both: a fair coin for every image; none.
    Images may be normalised: mixtures are linear.

    total, rows: the images are those rows of a global batch of `total`; what is drawn is drawn for all of it, and the
    neighbour of the first image is the last one here.
    """
    if kind == "none":
        return images
    height, width = images.shape[-2:]
    lam = _beta(total, alpha, generator)
    weight = lam.view(-1, 1, 1, 1).expand(total, 1, height, width)
    if kind != "mixup":
        pasted = _box_mask(lam, height, width, generator)
        use_mixup = coin(total, generator) if kind == "both" else torch.zeros(total, dtype=torch.bool)
        weight = torch.where(use_mixup.view(-1, 1, 1, 1), weight, 1 - pasted)
    return torch.lerp(images.roll(1, 0), images, weight[rows].to(images.device, images.dtype))


def _box_mask(lam: Tensor, height: int, width: int, generator: Generator) -> Tensor:
    """1 inside the box, [B, 1, H, W]."""
    side = (1 - lam).sqrt()[:, None]
    centre = torch.rand(2, len(lam), 1, generator=generator)
    row = (torch.arange(height) + 0.5 - centre[0] * height).abs() < side * height / 2
    column = (torch.arange(width) + 0.5 - centre[1] * width).abs() < side * width / 2
    return (row[:, None, :, None] & column[:, None, None, :]).float()


def _beta(count: int, alpha: float, generator: Generator) -> Tensor:
    # torch's own Beta takes no generator.
    seed = int(torch.randint(2**62, (1,), generator=generator))
    return torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, count)).float()
