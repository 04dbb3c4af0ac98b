"""Random views of images: drawn as numbers, then applied by torch here, or by DALI while it decodes.

Functions on images take float [B, 3, H, W] in 0..1 and return the same shape, dtype, range and device, vectorised over
the batch. Random numbers come from a CPU generator alone, so one generator state gives one result on every device and
in every loader. Distances are stated for 32x32 images and grow with the image.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dfkd.config import VIEWS
from dfkd.errors import UsageError

PADDING = 4 / 32
ROTATION = math.radians(15)
SCALE = (0.85, 1.15)
SHIFT = 3 / 32
CONTRAST = (0.6, 1.4)
BRIGHTNESS = 0.2
CHANNEL_GAIN = (0.8, 1.2)
# How far outside the image an affine view looks, in parts of a side: a corner, moved, turned and scaled.
REACH = ((1 + 2 * SHIFT) * (math.cos(ROTATION) + math.sin(ROTATION)) / SCALE[0] - 1) / 2
CUTOUT = 16 / 32  # side of the square; of CIFAR-10 in arXiv 1708.04552
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Views:
    """What is done to each of B images, in this order; None is nothing of the kind.

    window  int64 [B, 3]: top and left in the image padded with zeros by padding(H, W), and 1 where it is mirrored
    matrix  float32 [B, 2, 3]: output to input positions, both in -1..1; bilinear, reflected at the border
    colour  float32 [B, 5]: contrast, brightness and a gain for each channel
    hole    int64 [B, 4]: top, left, height and width of what becomes mid-grey
    """

    window: Tensor | None = None
    matrix: Tensor | None = None
    colour: Tensor | None = None
    hole: Tensor | None = None

    def rows(self, rows: slice) -> "Views":
        """Views of some of the images."""
        parts = (self.window, self.matrix, self.colour, self.hole)
        return Views(*(None if part is None else part[rows] for part in parts))

    def mirror(self, flip: Tensor) -> "Views":
        """A copy whose windows are mirrored where `flip` (bool [B]) is true, and not elsewhere."""
        assert self.window is not None  # of views that crop
        return replace(self, window=torch.cat((self.window[:, :2], flip.long()[:, None]), dim=1))


def draw(kind: str, batch: int, height: int, width: int, generator: Generator) -> Views:
    """Random views of ``batch`` images of height x width; rows are independent.

    kind: none; flip (horizontal); crop-flip (zero padding of 4, random crop, flip); crop-altflip (the same here:
    Order.mirrored knows what is mirrored in which epoch); shift (without the flip);
    affine (rotation of +-15 degrees, scale .85 to 1.15, shift of +-3 pixels, reflected at the border, no flip);
    affine-colour (affine, then contrast, brightness and channel gains); rrc-flip (a random part of 8 to 100 % of the
    area and of ratio 3/4 to 4/3, enlarged to the full size, and a flip); crop-flip-cutout and affine-colour-cutout
    (then a square of half the side becomes grey, its centre anywhere in the image, arXiv 1708.04552).
    Raises UsageError for another kind.
    """
    if kind == "none":
        return Views()
    if kind in ("crop-flip-cutout", "affine-colour-cutout"):
        views = draw(kind.removesuffix("-cutout"), batch, height, width, generator)
        return replace(views, hole=_holes(batch, height, width, generator))
    if kind == "flip":
        middle = torch.tensor(padding(height, width)).expand(batch, 2)
        return Views(window=torch.cat((middle, coin(batch, generator).long()[:, None]), dim=1))
    if kind in ("crop-flip", "crop-altflip", "shift"):
        pad = padding(height, width)
        top = torch.randint(0, 2 * pad[0] + 1, (batch,), generator=generator)
        left = torch.randint(0, 2 * pad[1] + 1, (batch,), generator=generator)
        flip = torch.zeros(batch, dtype=torch.bool) if kind == "shift" else coin(batch, generator)
        return Views(window=torch.stack((top, left, flip.long()), dim=1))
    if kind == "affine":
        return Views(matrix=_affine_matrix(batch, height, width, generator))
    if kind == "affine-colour":
        matrix = _affine_matrix(batch, height, width, generator)
        return Views(matrix=matrix, colour=_colour_change(batch, generator))
    if kind == "rrc-flip":
        return Views(matrix=_crop_matrix(batch, generator))
    raise UsageError(f"augmentation {kind!r} is unknown", f"known are {', '.join(VIEWS)}", "choose one of them")


def apply_views(images: Tensor, views: Views) -> Tensor:
    """Views of the images, float [B, 3, H, W]."""
    if views.window is not None:
        top, left, flip = views.window.unbind(1)
        images = crop(images, top, left, flip.bool(), padding(*images.shape[-2:]))
    if views.matrix is not None:
        images = warp(images, views.matrix)
    if views.colour is not None:
        contrast, brightness, gain = torch.split(views.colour.view(-1, 5, 1, 1), [1, 1, 3], dim=1)
        images = colour(images, contrast, brightness, gain)
    return images if views.hole is None else cut_out(images, views.hole)


def cut_out(images: Tensor, hole: Tensor) -> Tensor:
    """The images with mid-grey in their holes, int64 [B, 4] of `Views`."""
    top, left, high, wide = hole.to(images.device)[:, :, None].unbind(1)
    row, column = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    rows, columns = (row >= top) & (row < top + high), (column >= left) & (column < left + wide)
    inside = rows[:, :, None] & columns[:, None, :]
    return images.masked_fill(inside[:, None], 0.5)


def padding(height: int, width: int) -> tuple[int, int]:
    """Zeros above and below, and left and right."""
    return max(1, round(height * PADDING)), max(1, round(width * PADDING))


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
    batch, _, height, width = images.shape
    centres = _centres(height, width, images.device, images.dtype).expand(batch, -1, -1)
    grid = centres.bmm(matrix.to(images).transpose(1, 2)).view(batch, height, width, 2)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


@lru_cache(maxsize=4)
def _centres(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Pixel centres (x, y, 1) [height * width, 3] in -1..1: F.affine_grid makes them anew for every image."""
    x = torch.linspace(-1, 1, width) * ((width - 1) / width)
    y = torch.linspace(-1, 1, height) * ((height - 1) / height)
    columns, rows = x.expand(height, width), y[:, None].expand(height, width)
    return torch.stack((columns, rows, torch.ones(height, width)), dim=2).view(-1, 3).to(device, dtype)


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
    mirrored = torch.where(coin(batch, generator), -wide, wide)
    zero = torch.zeros(batch)
    return torch.stack((mirrored, zero, centre_x, zero, high, centre_y), dim=1).view(-1, 2, 3)


def _holes(batch: int, height: int, width: int, generator: Generator) -> Tensor:
    """int64 [B, 4] of `Views`: squares around any pixel, cut at the border."""
    found = []
    for side in (height, width):
        size = max(1, round(side * CUTOUT))
        start = torch.randint(0, side, (batch,), generator=generator) - size // 2
        found.append((start.clamp(min=0), (start + size).clamp(max=side) - start.clamp(min=0)))
    (top, high), (left, wide) = found
    return torch.stack((top, left, high, wide), dim=1)


def _colour_change(batch: int, generator: Generator) -> Tensor:
    contrast = _uniform(batch, *CONTRAST, generator)[:, None]
    brightness = _uniform(batch, -BRIGHTNESS, BRIGHTNESS, generator)[:, None]
    gain = _uniform(3 * batch, *CHANNEL_GAIN, generator).view(-1, 3)
    return torch.cat((contrast, brightness, gain), dim=1)


def _uniform(count: int, low: float, high: float, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def coin(count: int, generator: Generator) -> Tensor:
    """Draws of a fair coin, bool [count]."""
    return torch.rand(count, generator=generator) < 0.5
