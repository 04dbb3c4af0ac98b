"""Views: the images that the teacher sees, moved and recoloured at random: noise of single pixels earns guidance less.

    x'(i) = x(src),   src = scale i + offset, mirrored at the edges      along both axes; flip: a negative scale
    x'    = M x + b                                                      over the three channels

Moving is linear in x and separable: x' = R x C^T with R, C [B, H, H] of hats max(0, 1 - |src_i - j|), which is bilinear
interpolation. Shifts by whole pixels and flips are exact, the gradient is two products as well, in a fixed order of
summation, and a compiled engine makes R and C itself of the few numbers of an image, which are an input.

A view is taken before the teacher's resize, since a shift behind it would leave the resize's phase as it is. It follows
from the run's seed, the image's id and the gradient's number in its trajectory.
"""

import torch
from torch import Tensor

from dfkd.config import ViewConfig
from dfkd.errors import UsageError
from dfkd_kernels.philox import philox_uniform

# Streams of random numbers from here on belong to views, one for each gradient of a trajectory; CutMix's are below.
FIRST_STREAM = 1 << 31
PLACES, COLOURS = 4, 12  # numbers of a view: scale and offset down, scale and offset across; then M and b by rows
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's and torchvision's grey


def width(config: ViewConfig) -> int:
    """V, the numbers of a view; views are float32 [B, V]."""
    return PLACES + (COLOURS if config.colour else 0)


def most_shift(config: ViewConfig, side: int, teacher_side: int) -> int:
    """The longest shift in pixels of images of `side`: that of the settings is in pixels of the teacher's images.

    Raises UsageError: it is less than a pixel, or as long as the side.
    """
    found = config.shift * side // teacher_side
    if config.shift and not 0 < found < side:
        what = f"--guide-shift {config.shift} moves images of {side} pixels by {found}"
        why = f"it is in pixels of the teacher's {teacher_side}, and images have to move, by less than their side"
        least, most = -(-teacher_side // side), (side - 1) * teacher_side // side
        raise UsageError(what, why, f"use {least} to {most}, or 0" if least <= most else "leave it out")
    return found


def draw(config: ViewConfig, seed: int, ids: Tensor, number: int, side: int, teacher_side: int) -> Tensor:
    """Views float32 [B, V] of the images `ids`, int64 [B], of `side` pixels at gradient `number` of a trajectory.

    teacher_side: side in pixels of the teacher's images. Raises UsageError as `most_shift`.
    """
    u = philox_uniform(seed, ids, FIRST_STREAM + number, (9,))
    most, last = most_shift(config, side, teacher_side), side - 1
    share = config.crop + (1 - config.crop) * u[:, 0]
    shifts = ((2 * most + 1) * u[:, 1:3]).floor() - most
    places = (1 - share)[:, None] * last * u[:, 3:5] + shifts
    down, across = places[:, 0], places[:, 1]
    mirrored = (u[:, 5] < 0.5) & config.flip
    scale = torch.where(mirrored, -share, share)
    across = torch.where(mirrored, across + share * last, across)
    found = torch.stack([share, down, scale, across], 1)
    return found if not config.colour else torch.cat([found, _colours(1 + config.colour * (2 * u[:, 6:9] - 1))], 1)


def _colours(factors: Tensor) -> Tensor:
    """M and b [B, 12] of factors [B, 3] of brightness, contrast about mid-grey and saturation."""
    brightness, contrast, saturation = factors[:, :, None, None].unbind(1)
    grey = factors.new_tensor(_LUMA).expand(3, 3)
    matrix = brightness * contrast * (saturation * torch.eye(3).to(factors) + (1 - saturation) * grey)
    return torch.cat([matrix, (0.5 * (1 - contrast)).expand(-1, 3, 1)], 2).flatten(1)


def seen(images: Tensor, view: Tensor | None) -> Tensor:
    """Images [B, 3, H, W] under their views [B, V], differentiable; None: as they are. Colours may leave 0..1."""
    if view is None:
        return images
    view = view.to(images.dtype)
    rows, columns = (_hats(view[:, k], view[:, k + 1], images.shape[2 + k // 2]) for k in (0, 2))
    across = torch.unflatten(images.flatten(1, 2).bmm(columns.transpose(1, 2)), 1, (3, -1))
    moved = torch.unflatten(rows.bmm(across.transpose(1, 2).flatten(2)), 2, (3, -1)).transpose(1, 2)
    if view.shape[1] == PLACES:
        return moved
    colours = view[:, PLACES:].reshape(-1, 3, 4)
    mixed = colours[:, :, :3].bmm(moved.flatten(2)) + colours[:, :, 3:]
    return torch.unflatten(mixed, 2, (moved.shape[2], -1))


def _hats(scale: Tensor, offset: Tensor, side: int) -> Tensor:
    """Weights [B, side, side] of pixel j in place i: a triangle about the place that it is taken from."""
    steps = torch.arange(side, device=scale.device, dtype=scale.dtype)
    source = scale[:, None] * steps + offset[:, None]
    last = side - 1
    source = last - (last - source.abs()).abs()  # mirrored at both edges: it lies less than a side beyond one of them
    return (1 - (source[:, :, None] - steps).abs()).clamp_min(0)
