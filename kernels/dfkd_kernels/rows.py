"""How the rows of a group lie in a network's input and output.

A group of G images is cut into K micro-batches of m rows, the last filled up with the group's last image.
Classifier-free guidance doubles them, and each call finds its rows together:

    micro-batch 0: unconditional 0 .. m-1, conditional 0 .. m-1;   micro-batch 1: unconditional m .. 2m-1, ...

Image i is at (i // m) n m + i % m in a buffer of n copies, and its second copy m rows on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NetworkInput:
    """What a network takes in the place of latents: latents / scale + shift, in a dtype and a memory format.

    dtype None: that of the latents.
    """

    dtype: torch.dtype | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    scale: float = 1.0
    shift: float = 0.0

    def of(self, latents: Tensor) -> Tensor:
        """`latents` [B, C, h, w] as the network takes them; themselves where nothing is to be done."""
        scaled = latents if self.scale == 1 and self.shift == 0 else latents / self.scale + self.shift
        return scaled.to(self.dtype or latents.dtype, memory_format=self.memory_format)

    def empty(self, rows: int, latents: Tensor) -> Tensor:
        """Uninitialised input of `rows` rows for latents [B, C, h, w]."""
        return torch.empty(
            (rows, *latents.shape[1:]),
            dtype=self.dtype or latents.dtype,
            device=latents.device,
            memory_format=self.memory_format,
        )


def row_count(images: int, micro: int, copies: int) -> int:
    return -(-images // micro) * micro * copies


def network_rows(latents: Tensor, micro: int, copies: int) -> Tensor:
    """Latents [G, C, h, w] -> the rows [K copies m, C, h, w] of all calls; themselves where they are that already."""
    images = len(latents)
    if micro >= images:
        return latents if copies == 1 else torch.cat([latents] * copies)
    filled = torch.arange(row_count(images, micro, 1), device=latents.device).clamp_max(images - 1)
    cut = latents[filled].view(-1, 1, micro, *latents.shape[1:])
    return cut.expand(-1, copies, *cut.shape[2:]).flatten(0, 2)


def copies_of(rows: Tensor, images: int, micro: int, copies: int) -> list[Tensor]:
    """The inverse: the first and, of two copies, the second output [G, C, h, w] of every image."""
    if micro >= images:
        return list(rows.chunk(copies))
    cut = rows.view(-1, copies, micro, *rows.shape[1:])
    return [cut[:, copy].flatten(0, 1)[:images] for copy in range(copies)]


def is_flat(x: Tensor) -> bool:
    """Whether [B, C, h, w] is dense in one of the two orders that the kernels walk in."""
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def pixels_first(x: Tensor) -> bool:
    """Whether it lies in the order of torch.channels_last, and not in the other one as well."""
    return not x.is_contiguous()


def flat(x: Tensor, like: Tensor | None = None) -> Tensor:
    """`x` itself where a kernel can walk it (in the order of `like`, where that is given), else a copy."""
    if like is None:
        return x if is_flat(x) else x.contiguous()
    wanted = torch.channels_last if pixels_first(like) else torch.contiguous_format
    return x.contiguous(memory_format=wanted)
