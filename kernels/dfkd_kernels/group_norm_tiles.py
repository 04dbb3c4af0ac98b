"""How the launches of kernels/group_norm_silu.py cut a feature map into tiles, and where a program finds its own.

A group that fits a program's registers is one program's: its values are read once. A larger one is cut over many, and
read again once its statistics are known. A tile is [pixels, channels] in either memory order.

No cut depends on the batch, so an image has the same bits whatever images come with it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only installation needs the reference alone
    triton = None

WHOLE = 8192  # values of the largest group that one program keeps: sixteen a thread, of x and of the gradient
TILE = 4096  # sixteen values a thread of eight warps: two 128-bit loads of a half in flight, four of float32
WIDE = 64  # channels of an NHWC tile: whole 128-byte lines, and pixels enough that what a chunk leaves is small
STEPS = 8  # most tiles of a program
PROGRAMS = 128  # an image is cut over this many before a program takes more than one tile
PARTS = 2048  # parts that are combined at a time
ALIGNED = 16  # bytes; the layout of a tile, and with it the order of sums, follows from a pointer's alignment


@dataclass(frozen=True)
class Tiling:
    """Of one image [pixels, channels].

    whole: a program takes a group, in one tile. Otherwise blocks of channels times chunks of `steps` tiles of pixels.
    pixels, channels: sides of a tile, powers of two.
    """

    whole: bool
    pixels: int
    channels: int
    warps: int
    steps: int = 1
    chunks: int = 1
    blocks: int = 1


def tiling(channels: int, groups: int, pixels: int, nhwc: bool) -> Tiling:
    """How an image is cut; nothing but its shape and memory order decides."""
    high, wide = _power(pixels), _power(channels // groups)
    if high * wide <= WHOLE:
        return Tiling(True, high, wide, min(max(high * wide // 512, 1), 16))
    if nhwc:
        wide = min(_power(channels), WIDE)
        high = TILE // wide
    else:
        high = min(high, TILE)
        wide = min(TILE // high, _power(channels))
    blocks, tiles = -(-channels // wide), -(-pixels // high)
    steps = min(max(blocks * tiles // PROGRAMS, 1), STEPS, tiles)
    return Tiling(False, high, wide, 8, steps, -(-tiles // steps), blocks)


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def accumulated(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pixels_first(x: Tensor) -> bool:
    """Whether [B, C, ...] is dense with the channels of a pixel side by side, and not dense as it is written too."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def like(x: Tensor) -> Tensor:
    """A new tensor in the order in which x is walked: its own where that is one of the two, else as it is written."""
    if pixels_first(x):
        return torch.empty_like(x.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def walkable(x: Tensor, nhwc: bool) -> Tensor:
    """x itself, or a copy in that order whose first value is aligned."""
    dense = x.movedim(1, -1).contiguous().movedim(-1, 1) if nhwc else x.contiguous()
    return dense if dense.data_ptr() % ALIGNED == 0 else dense.clone()


class Cut:
    """Grids and compile-time arguments of the launches on a feature map [B, C, ...]."""

    def __init__(self, x: Tensor, groups: int, nhwc: bool) -> None:
        images, channels = x.shape[:2]
        pixels = x.numel() // (images * channels)
        self.tile = tile = tiling(channels, groups, pixels, nhwc)
        self.groups, self.programs = (images * groups,), (images * tile.blocks * tile.chunks,)
        self._shape = (images, 2, tile.chunks, channels)
        map_of = {"PIXELS": pixels, "CHANNELS": channels}
        sides = {"NHWC": nhwc, "HIGH": tile.pixels, "WIDE": tile.channels, "num_warps": tile.warps}
        self.whole = {**map_of, **sides, "GROUPS": groups}
        self.tiles = {**map_of, **sides, "STEPS": tile.steps, "CHUNKS": tile.chunks, "BLOCKS": tile.blocks}
        wide = _power(channels // groups)
        high = min(max(PARTS // wide, 1), _power(tile.chunks))
        self.combining = {**map_of, "GROUPS": groups, "CHUNKS": tile.chunks, "HIGH": high, "WIDE": wide, "num_warps": 8}

    def parts(self, statistics: Tensor) -> Tensor:
        """For what every chunk of pixels leaves of every channel: two numbers, of the statistics' precision."""
        return statistics.new_empty(self._shape)


if triton is not None:
    STEPS_AT_MOST = tl.constexpr(STEPS)

    @triton.jit  # type: ignore[untyped-decorator]
    def corner(image, pixel, channel, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, NHWC: tl.constexpr):  # type: ignore[no-untyped-def]
        """Where a tile begins; 64 bits, since image has them."""
        if NHWC:
            return (image * PIXELS + pixel) * CHANNELS + channel
        else:
            return (image * CHANNELS + channel) * PIXELS + pixel

    @triton.jit  # type: ignore[untyped-decorator]
    def within(row, column, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, NHWC: tl.constexpr):  # type: ignore[no-untyped-def]
        """Offsets [PIXELS, CHANNELS] from a tile's corner: 32 bits hold them but of images that no network has."""
        if STEPS_AT_MOST * row.shape[0] * CHANNELS > 2147483647:
            row = row.to(tl.int64)
        if NHWC:
            return row[:, None] * CHANNELS + column[None, :]
        else:
            return column[None, :] * PIXELS + row[:, None]

    @triton.jit  # type: ignore[untyped-decorator]
    def group_of(  # type: ignore[no-untyped-def]
        program,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUPS: tl.constexpr,
        NHWC: tl.constexpr,
        HIGH: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        """Of the program that has a whole group: where its values lie, which places of the tile have one, channels."""
        WIDTH: tl.constexpr = CHANNELS // GROUPS
        first, image = program % GROUPS * WIDTH, (program // GROUPS).to(tl.int64)
        row, column = tl.arange(0, HIGH), tl.arange(0, WIDE)
        live = (row < PIXELS)[:, None] & (column < WIDTH)[None, :]
        at = corner(image, 0, first, PIXELS, CHANNELS, NHWC) + within(row, column, PIXELS, CHANNELS, NHWC)
        return at, live, first + column

    @triton.jit  # type: ignore[untyped-decorator]
    def place(program, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Block of channels, chunk of pixels and image of a program: neighbours read neighbouring memory."""
        return program % BLOCKS, program // BLOCKS % CHUNKS, (program // (BLOCKS * CHUNKS)).to(tl.int64)

    @triton.jit  # type: ignore[untyped-decorator]
    def of_channels(ptr, channel, CHANNELS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
        """A weight of each channel, [1, CHANNELS]."""
        return tl.load(ptr + channel, mask=channel < CHANNELS, other=0.0).to(DTYPE)[None, :]

    @triton.jit  # type: ignore[untyped-decorator]
    def of_groups(ptr, image, channel, CHANNELS: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
        """What its group has, for each channel, [1, CHANNELS]."""
        at = ptr + image * GROUPS + channel // (CHANNELS // GROUPS)
        return tl.load(at, mask=channel < CHANNELS, other=0.0)[None, :]
