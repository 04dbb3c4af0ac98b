"""Group normalisation's gradient in its input, as kernels/group_norm_silu.py defines it: one launch, or three.

_whole       a program has a group in its registers
_slopes      sums of g and of g xh of every channel in a chunk of pixels
_sums        <g> and <g xh>: of a group's chunks and channels together
_gradient    dx
"""

import torch
from torch import Tensor

from dfkd_kernels.group_norm_tiles import Cut, like, pixels_first, walkable

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only installation needs the reference alone
    triton = None
else:
    from dfkd_kernels.group_norm_tiles import corner, group_of, of_channels, of_groups, place, within

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def before_affine(dy, xh, w, b, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
        """The gradient in the normalised values: dy act'(v) w, v = w xh + b."""
        if SILU:
            v = xh * w + b
            s = tl.sigmoid(v)
            dy = dy * (s * (1.0 + v * (1.0 - s)))
        return dy * w

    @triton.jit  # type: ignore[untyped-decorator]
    def _whole(  # type: ignore[no-untyped-def]
        dx_ptr,  # like x
        dy_ptr,  # like x
        x_ptr,
        mean_ptr,
        rstd_ptr,
        weight_ptr,
        bias_ptr,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUPS: tl.constexpr,
        SILU: tl.constexpr,
        NHWC: tl.constexpr,
        HIGH: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
        at, live, channel = group_of(tl.program_id(0), PIXELS, CHANNELS, GROUPS, NHWC, HIGH, WIDE)
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(DTYPE)
        dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(DTYPE)  # 0 where nothing is, and so are its products
        mean, rstd = tl.load(mean_ptr + tl.program_id(0)), tl.load(rstd_ptr + tl.program_id(0))
        w, b = of_channels(weight_ptr, channel, CHANNELS, DTYPE), of_channels(bias_ptr, channel, CHANNELS, DTYPE)
        xh = (x - mean) * rstd
        g = before_affine(dy, xh, w, b, SILU)
        COUNT: tl.constexpr = PIXELS * (CHANNELS // GROUPS) * 1.0
        plain, along = tl.sum(tl.sum(g, 1), 0) / COUNT, tl.sum(tl.sum(g * xh, 1), 0) / COUNT
        dx = (g - plain - xh * along) * rstd
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=live)

    @triton.jit  # type: ignore[untyped-decorator]
    def _slopes(  # type: ignore[no-untyped-def]
        part_ptr,  # [B, 2, chunks, C]: sums of g, and of g times the normalised values
        dy_ptr,
        x_ptr,
        mean_ptr,
        rstd_ptr,
        weight_ptr,
        bias_ptr,
        PIXELS: tl.constexpr,
        CHUNKS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUPS: tl.constexpr,
        SILU: tl.constexpr,
        NHWC: tl.constexpr,
        HIGH: tl.constexpr,
        WIDE: tl.constexpr,
        STEPS: tl.constexpr,
        BLOCKS: tl.constexpr,
    ):
        DTYPE: tl.constexpr = part_ptr.dtype.element_ty
        block, chunk, image = place(tl.program_id(0), CHUNKS, BLOCKS)
        first = chunk * (STEPS * HIGH)
        row, column = tl.arange(0, HIGH), tl.arange(0, WIDE)
        channel = block * WIDE + column
        mean = of_groups(mean_ptr, image, channel, CHANNELS, GROUPS)
        rstd = of_groups(rstd_ptr, image, channel, CHANNELS, GROUPS)
        w, b = of_channels(weight_ptr, channel, CHANNELS, DTYPE), of_channels(bias_ptr, channel, CHANNELS, DTYPE)
        start = corner(image, first, block * WIDE, PIXELS, CHANNELS, NHWC)
        plain = tl.zeros([HIGH, WIDE], DTYPE)
        along = tl.zeros([HIGH, WIDE], DTYPE)
        for step in range(STEPS):
            pixel = step * HIGH + row
            live = (first + pixel < PIXELS)[:, None] & (channel < CHANNELS)[None, :]
            at = within(pixel, column, PIXELS, CHANNELS, NHWC)
            xh = (tl.load(x_ptr + start + at, mask=live, other=0.0).to(DTYPE) - mean) * rstd
            dy = tl.load(dy_ptr + start + at, mask=live, other=0.0).to(DTYPE)
            g = before_affine(dy, xh, w, b, SILU)
            plain += g
            along += g * xh
        part_ptr += (image * 2 * CHUNKS + chunk) * CHANNELS
        tl.store(part_ptr + channel, tl.sum(plain, 0), mask=channel < CHANNELS)
        tl.store(part_ptr + CHUNKS * CHANNELS + channel, tl.sum(along, 0), mask=channel < CHANNELS)

    @triton.jit  # type: ignore[untyped-decorator]
    def _sums(  # type: ignore[no-untyped-def]
        plain_ptr,  # [B, G]: means over a group of g, and of g times the normalised values
        along_ptr,
        part_ptr,  # of _slopes
        PIXELS: tl.constexpr,
        CHUNKS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUPS: tl.constexpr,
        HIGH: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        DTYPE: tl.constexpr = part_ptr.dtype.element_ty
        WIDTH: tl.constexpr = CHANNELS // GROUPS
        group, image = tl.program_id(0) % GROUPS, (tl.program_id(0) // GROUPS).to(tl.int64)
        part_ptr += image * 2 * CHUNKS * CHANNELS + group * WIDTH
        row, column = tl.arange(0, HIGH), tl.arange(0, WIDE)
        plain = tl.zeros([HIGH, WIDE], DTYPE)
        along = tl.zeros([HIGH, WIDE], DTYPE)
        for start in range(0, CHUNKS, HIGH):
            chunk = start + row
            live = (chunk < CHUNKS)[:, None] & (column < WIDTH)[None, :]
            at = part_ptr + chunk[:, None] * CHANNELS + column[None, :]
            plain += tl.load(at, mask=live, other=0.0)
            along += tl.load(at + CHUNKS * CHANNELS, mask=live, other=0.0)
        COUNT: tl.constexpr = PIXELS * WIDTH * 1.0
        tl.store(plain_ptr + tl.program_id(0), tl.sum(tl.sum(plain, 1), 0) / COUNT)
        tl.store(along_ptr + tl.program_id(0), tl.sum(tl.sum(along, 1), 0) / COUNT)

    @triton.jit  # type: ignore[untyped-decorator]
    def _gradient(  # type: ignore[no-untyped-def]
        dx_ptr,
        dy_ptr,
        x_ptr,
        mean_ptr,
        rstd_ptr,
        plain_ptr,
        along_ptr,
        weight_ptr,
        bias_ptr,
        PIXELS: tl.constexpr,
        CHUNKS: tl.constexpr,
        CHANNELS: tl.constexpr,
        GROUPS: tl.constexpr,
        SILU: tl.constexpr,
        NHWC: tl.constexpr,
        HIGH: tl.constexpr,
        WIDE: tl.constexpr,
        STEPS: tl.constexpr,
        BLOCKS: tl.constexpr,
    ):
        DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
        block, chunk, image = place(tl.num_programs(0) - 1 - tl.program_id(0), CHUNKS, BLOCKS)  # as _apply
        first = chunk * (STEPS * HIGH)
        row, column = tl.arange(0, HIGH), tl.arange(0, WIDE)
        channel = block * WIDE + column
        mean = of_groups(mean_ptr, image, channel, CHANNELS, GROUPS)
        rstd = of_groups(rstd_ptr, image, channel, CHANNELS, GROUPS)
        plain = of_groups(plain_ptr, image, channel, CHANNELS, GROUPS)
        along = of_groups(along_ptr, image, channel, CHANNELS, GROUPS)
        w, b = of_channels(weight_ptr, channel, CHANNELS, DTYPE), of_channels(bias_ptr, channel, CHANNELS, DTYPE)
        start = corner(image, first, block * WIDE, PIXELS, CHANNELS, NHWC)
        for step in range(STEPS):
            pixel = step * HIGH + row
            live = (first + pixel < PIXELS)[:, None] & (channel < CHANNELS)[None, :]
            at = within(pixel, column, PIXELS, CHANNELS, NHWC)
            xh = (tl.load(x_ptr + start + at, mask=live, other=0.0).to(DTYPE) - mean) * rstd
            dy = tl.load(dy_ptr + start + at, mask=live, other=0.0).to(DTYPE)
            dx = (before_affine(dy, xh, w, b, SILU) - plain - xh * along) * rstd
            tl.store(dx_ptr + start + at, dx.to(dx_ptr.dtype.element_ty), mask=live)


def launch_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool
) -> Tensor:
    """dx in the order of x."""
    dx, nhwc = like(x), pixels_first(x)
    if not x.numel():
        return dx
    cut = Cut(x, groups, nhwc)
    given = (walkable(dy, nhwc), walkable(x, nhwc), mean, rstd)
    weights = (weight.contiguous(), bias.contiguous())
    if cut.tile.whole:
        _whole[cut.groups](dx, *given, *weights, SILU=silu, **cut.whole)
        return dx
    part, plain, along = cut.parts(mean), torch.empty_like(mean), torch.empty_like(mean)
    _slopes[cut.programs](part, *given, *weights, GROUPS=groups, SILU=silu, **cut.tiles)
    _sums[cut.groups](plain, along, part, **cut.combining)
    _gradient[cut.programs](dx, *given, plain, along, *weights, GROUPS=groups, SILU=silu, **cut.tiles)
    return dx
