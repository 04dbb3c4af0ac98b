"""Images of one side brought to another: how a network is shown images that are larger or smaller than its own."""

import torch.nn.functional as F
from torch import Tensor

from dfkd.config import RESIZES
from dfkd.errors import UsageError


def resized(images: Tensor, size: int, how: str) -> Tensor:
    """Images [B, C, H, W] of any float dtype -> [B, C, size, size], bicubic, differentiable; unchanged where they fit.

    how, for images that shrink along a side; those that only grow are the same by both:
        antialias  the kernel is widened by as much, so that each pixel counts: Pillow's and torchvision's resize
        published  16 pixels for each new one at any scale, as in the published guidance (arXiv 2504.00870): of 512 to
                   32, 6 in 100 pixels are seen at all
    """
    if images.shape[-2:] == (size, size):
        return images
    shrinks = max(images.shape[-2:]) > size
    return F.interpolate(
        images, size=[size, size], mode="bicubic", align_corners=False, antialias=shrinks and how == "antialias"
    )


def check_resize(how: object) -> None:
    """Raise UsageError for a way of resizing that there is not."""
    if how not in RESIZES:
        raise UsageError(f"resize {how!r}", f"known are {', '.join(RESIZES)}", "choose one of them")
