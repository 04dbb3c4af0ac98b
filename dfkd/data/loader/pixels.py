"""Pixels as they are before any view: decoded, in the size of the networks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd.data.loader.contract import Images

READ_ROWS = 1024


def read_all(data: Images, positions: Tensor, size: int) -> Tensor:
    """uint8 [n, 3, size, size] at int64 [n] positions."""
    return torch.cat([resize(data.read(part), size) for part in torch.split(positions, READ_ROWS)])


def read_pixels(data: Images, positions: Tensor, size: int) -> Tensor:
    """uint8 [n, size, size, 3], contiguous: channels last in memory, which is what convolutions want of a batch."""
    return read_all(data, positions, size).permute(0, 2, 3, 1).contiguous()


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, H, W] -> uint8 [B, 3, size, size], bicubic without antialiasing: what guidance showed the teacher.

    Once when read rather than at each step, and so that augmentation works in the pixels of the networks.
    """
    if images.shape[-2:] == (size, size):
        return images
    resized = F.interpolate(images.float(), size=[size, size], mode="bicubic", align_corners=False)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


class Decoded:
    """The images at ``positions`` int64 [n], in main memory in the size of the networks; here they are 0 to n - 1.

    digest and class_names are those of the whole.
    """

    def __init__(self, data: Images, positions: Tensor, size: int) -> None:
        self._pixels = read_pixels(data, positions, size)
        self.labels, self.ids = data.labels[positions], data.ids[positions]
        self.class_names, self._whole = data.class_names, data

    @property
    def digest(self) -> str:
        return self._whole.digest

    def read(self, positions: Tensor) -> Tensor:
        return self._pixels[positions].permute(0, 3, 1, 2)
