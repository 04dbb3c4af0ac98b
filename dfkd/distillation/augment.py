"""Tensor augmentations, vectorised over the batch.

Every function takes images as float [B, 3, H, W] in 0..1 and returns the same shape, dtype, range and device.
Random numbers come from a CPU generator alone, so one generator state gives one result on every device.
Distances are stated for 32x32 images and grow with the image.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dfkd.errors import UsageError

KINDS = ("none", "crop-flip", "shift", "affine", "affine-colour", "rrc-flip")
MIXES = ("none", "mixup", "cutmix", "both")

PADDING = 4 / 32
ROTATION = math.radians(15)
SCALE = (0.85, 1.15)
SHIFT = 3 / 32
CONTRAST = (0.6, 1.4)
BRIGHTNESS = 0.2
CHANNEL_GAIN = (0.8, 1.2)
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)


def augment(images: Tensor, kind: str, generator: Generator) -> Tensor:
    """One random view of every image; rows are independent.

    kind: none; crop-flip (zero padding of 4, random crop, horizontal flip); shift (the same without the flip);
    affine (rotation of +-15 degrees, scale .85 to 1.15, shift of +-3 pixels, reflected at the border, no flip);
    affine-colour (affine, then contrast, brightness and channel gains); rrc-flip (a random part of 8 to 100 % of the
    area and of ratio 3/4 to 4/3, enlarged to the full size, and a flip).
    Raises UsageError for another kind.
    """
    batch, _, height, width = images.shape
    if kind == "none":
        return images
    if kind in ("crop-flip", "shift"):
        pad = (max(1, round(height * PADDING)), max(1, round(width * PADDING)))
        top = torch.randint(0, 2 * pad[0] + 1, (batch,), generator=generator)
        left = torch.randint(0, 2 * pad[1] + 1, (batch,), generator=generator)
        flip = _coin(batch, generator) if kind == "crop-flip" else torch.zeros(batch, dtype=torch.bool)
        return crop(images, top, left, flip, pad)
    if kind in ("affine", "affine-colour"):
        moved = warp(images, _affine_matrix(batch, height, width, generator))
        return moved if kind == "affine" else colour(moved, *_colour_change(batch, generator))
    if kind == "rrc-flip":
        return warp(images, _crop_matrix(batch, generator))
    raise UsageError(f"augmentation {kind!r} is unknown", f"known are {', '.join(KINDS)}", "choose one of them")


def mix(images: Tensor, kind: str, alpha: float, generator: Generator) -> Tensor:
    """Mixtures of each image with its neighbour in the batch (the loader has shuffled them).

    lam ~ Beta(alpha, alpha) for every image. mixup: lam x + (1 - lam) x'; cutmix: a box of W sqrt(1 - lam) by
    H sqrt(1 - lam) with uniform centre, clipped at the border, comes from x'; both: a fair coin for every image.
    Labels are not mixed: in distillation the teacher labels the mixture. Raises UsageError for another kind.
    """
    if kind not in MIXES:
        raise UsageError(f"mix {kind!r} is unknown", f"known are {', '.join(MIXES)}", "choose one of them")
    if kind == "none":
        return images
    batch, _, height, width = images.shape
    lam = _beta(batch, alpha, generator)
    weight = lam.view(-1, 1, 1, 1).expand(batch, 1, height, width)
    if kind != "mixup":
        pasted = _box_mask(lam, height, width, generator)
        use_mixup = _coin(batch, generator) if kind == "both" else torch.zeros(batch, dtype=torch.bool)
        weight = torch.where(use_mixup.view(-1, 1, 1, 1), weight, 1 - pasted)
    return torch.lerp(images.roll(1, 0), images, weight.to(images.device, images.dtype))


def crop(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, pad: tuple[int, int]) -> Tensor:
    """Window (top, left) of each zero-padded image, mirrored where flip; top, left int64 [B], flip bool [B]."""
    _, _, height, width = images.shape
    padded = F.pad(images, (pad[1], pad[1], pad[0], pad[0]))
    column = torch.arange(width).expand(len(flip), -1)
    column = torch.where(flip[:, None], width - 1 - column, column) + left[:, None]
    row = torch.arange(height) + top[:, None]
    item = torch.arange(len(flip), device=images.device)[:, None, None]
    window = padded[item, :, row.to(images.device)[:, :, None], column.to(images.device)[:, None, :]]
    return window.permute(0, 3, 1, 2)  # advanced indexing put the channels last, where convolutions want them


def warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Bilinear resampling: matrix [B, 2, 3] maps output to input positions, both in -1..1; reflected outside."""
    grid = F.affine_grid(matrix.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def colour(images: Tensor, contrast: Tensor, brightness: Tensor, gain: Tensor) -> Tensor:
    """clamp(((x - m) contrast + m + brightness) gain, 0, 1), m the image's mean.

    contrast and brightness are [B, 1, 1, 1], gain is [B, 3, 1, 1].
    """
    scale = (contrast.to(images.device) * gain.to(images.device)).to(images.dtype)
    mean = images.mean((1, 2, 3), keepdim=True)
    offset = (mean * (1 - contrast.to(images)) + brightness.to(images)) * gain.to(images)
    return torch.addcmul(offset, images, scale).clamp_(0, 1)


def _affine_matrix(batch: int, height: int, width: int, generator: Generator) -> Tensor:
    angle = _uniform(batch, -ROTATION, ROTATION, generator)
    zoom = 1 / _uniform(batch, *SCALE, generator)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    # Grid units differ between the axes of an image that is not square; the ratio keeps the rotation rigid.
    ratio = height / width
    turn = torch.stack((cos, -sin * ratio, sin / ratio, cos), dim=1).view(-1, 2, 2)
    # The result moves by (x, y) when its position p is looked up at turn (p - (x, y)); the image is 2 units wide.
    move = _uniform(2 * batch, -2 * SHIFT, 2 * SHIFT, generator).view(batch, 2, 1)
    return torch.cat((turn, -turn @ move), dim=2)


def _crop_matrix(batch: int, generator: Generator) -> Tensor:
    area = _uniform(batch, *CROP_AREA, generator)
    ratio = _uniform(batch, math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]), generator).exp()
    wide = (area * ratio).sqrt().clamp(max=1)
    high = (area / ratio).sqrt().clamp(max=1)
    centre_x = (1 - wide) * _uniform(batch, -1, 1, generator)
    centre_y = (1 - high) * _uniform(batch, -1, 1, generator)
    mirrored = torch.where(_coin(batch, generator), -wide, wide)
    zero = torch.zeros(batch)
    return torch.stack((mirrored, zero, centre_x, zero, high, centre_y), dim=1).view(-1, 2, 3)


def _colour_change(batch: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    contrast = _uniform(batch, *CONTRAST, generator).view(-1, 1, 1, 1)
    brightness = _uniform(batch, -BRIGHTNESS, BRIGHTNESS, generator).view(-1, 1, 1, 1)
    gain = _uniform(3 * batch, *CHANNEL_GAIN, generator).view(-1, 3, 1, 1)
    return contrast, brightness, gain


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


def _uniform(count: int, low: float, high: float, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _coin(count: int, generator: Generator) -> Tensor:
    return torch.rand(count, generator=generator) < 0.5
