"""The launches of kernels/batch_norm_tap.py, which has the equations: forward, sums of its parts, and gradient.

A program takes some channels of an image, and all of their pixels or a part of them. Tiles follow from the size of the
layer, never from the batch: an image has the same bits in any.
"""

from typing import Any

import torch
from torch import Tensor

from dfkd_kernels.rows import flat, pixels_first

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only installation needs the reference alone
    triton = None

TILE, WARP = 4096, 512  # values that a program holds at a time, and those of a warp: sixteen a thread
PROGRAM = 16384  # values that a program goes through
CHANNELS = 64  # side by side in channels_last: 128 bytes of the narrowest dtype
PARTS, ROWS = 128, 32  # of the second launch: parts and rows of sums that are added up at a time


def accumulated(x: Tensor) -> torch.dtype:
    """In what it is computed."""
    return torch.promote_types(x.dtype, torch.float32)


def results_of(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, m1 and m2 [B, C], uninitialised."""
    m1, m2 = (x.new_empty(x.shape[:2], dtype=accumulated(x)) for _ in range(2))
    return torch.empty_like(x), m1, m2


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def layer_of(  # type: ignore[no-untyped-def]
        mean_ptr, variance_ptr, weight_ptr, bias_ptr, channel, there, EPS: tl.constexpr, DTYPE: tl.constexpr
    ):
        """Of channels [C]: the running mean, and factor and shift of the difference to it."""
        mean = tl.load(mean_ptr + channel, mask=there, other=0.0).to(DTYPE)
        variance = tl.load(variance_ptr + channel, mask=there, other=1.0).to(DTYPE) + EPS
        if variance.dtype == tl.float64:
            scale = 1.0 / tl.sqrt(variance)
        else:  # those of one float32 rounding, which the plain ones are not
            scale = tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance))
        if weight_ptr is not None:
            scale *= tl.load(weight_ptr + channel, mask=there, other=0.0).to(DTYPE)
        shift = tl.zeros(variance.shape, DTYPE)
        if bias_ptr is not None:
            shift = tl.load(bias_ptr + channel, mask=there, other=0.0).to(DTYPE)
        return mean, scale, shift

    @triton.jit  # type: ignore[untyped-decorator]
    def place_of(image, channel, pixel, channels, pixels, NHWC: tl.constexpr):  # type: ignore[no-untyped-def]
        """Where channels [C, 1] and pixels [1, P] of an image lie in a dense map."""
        within = pixel * channels + channel if NHWC else channel * pixels + pixel
        return image * channels * pixels + within

    @triton.jit  # type: ignore[untyped-decorator]
    def _forward(  # type: ignore[no-untyped-def]
        y_ptr,  # [B, C, H, W], dense in either memory format, like x
        m1_ptr,  # [parts, B, C] float32 or float64: moments where there is one part, else sums of each
        m2_ptr,
        x_ptr,
        mean_ptr,  # [C], with the three below
        variance_ptr,
        weight_ptr,  # or None
        bias_ptr,  # or None
        rows,  # B C
        channels,
        pixels,
        NHWC: tl.constexpr,
        RELU: tl.constexpr,
        EPS: tl.constexpr,
        WHOLE: tl.constexpr,  # one part
        CHANNELS: tl.constexpr,  # of a tile, and its pixels; pixels of a part
        PIXELS: tl.constexpr,
        SPAN: tl.constexpr,
    ):
        DTYPE: tl.constexpr = m1_ptr.dtype.element_ty
        blocks = tl.cdiv(channels, CHANNELS)
        image = (tl.program_id(0) // blocks).to(tl.int64)
        channel = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
        there = channel < channels
        mean, scale, shift = layer_of(mean_ptr, variance_ptr, weight_ptr, bias_ptr, channel, there, EPS, DTYPE)
        m1 = tl.zeros([CHANNELS, PIXELS], DTYPE)
        m2 = tl.zeros([CHANNELS, PIXELS], DTYPE)
        first = tl.program_id(1) * SPAN
        for start in range(first, tl.minimum(first + SPAN, pixels), PIXELS):
            pixel = (start + tl.arange(0, PIXELS))[None, :]
            live = there[:, None] & (pixel < pixels)
            at = place_of(image, channel[:, None], pixel, channels, pixels, NHWC)
            x = tl.load(x_ptr + at, mask=live, other=0.0).to(DTYPE)
            d = tl.where(live, x - mean[:, None], 0.0)
            m1 += d
            m2 += d * d
            y = d * scale[:, None] + shift[:, None]
            if RELU:
                y = tl.where(y < 0.0, 0.0, y)  # NaN stays
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=live)
        first_sum, second_sum = tl.sum(m1, 1), tl.sum(m2, 1)
        if WHOLE:
            count = tl.zeros([CHANNELS], DTYPE) + pixels
            first_sum, second_sum = first_sum / count, second_sum / count
        row = tl.program_id(1).to(tl.int64) * rows + image * channels + channel
        tl.store(m1_ptr + row, first_sum, mask=there)
        tl.store(m2_ptr + row, second_sum, mask=there)

    @triton.jit  # type: ignore[untyped-decorator]
    def _added_up(  # type: ignore[no-untyped-def]
        m1_ptr,  # [rows], what the sums come to
        m2_ptr,
        m1_parts_ptr,  # [parts, rows]
        m2_parts_ptr,
        rows,
        parts,
        pixels,
        ROWS: tl.constexpr,
        PARTS: tl.constexpr,
    ):
        DTYPE: tl.constexpr = m1_ptr.dtype.element_ty
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        m1 = tl.zeros([PARTS, ROWS], DTYPE)
        m2 = tl.zeros([PARTS, ROWS], DTYPE)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            live = (part < parts)[:, None] & (row < rows)[None, :]
            at = part.to(tl.int64)[:, None] * rows + row[None, :]
            m1 += tl.load(m1_parts_ptr + at, mask=live, other=0.0)
            m2 += tl.load(m2_parts_ptr + at, mask=live, other=0.0)
        count = tl.zeros([ROWS], DTYPE) + pixels
        tl.store(m1_ptr + row, tl.sum(m1, 0) / count, mask=row < rows)
        tl.store(m2_ptr + row, tl.sum(m2, 0) / count, mask=row < rows)

    @triton.jit  # type: ignore[untyped-decorator]
    def _backward_kernel(  # type: ignore[no-untyped-def]
        dx_ptr,  # [B, C, H, W] like x
        x_ptr,
        dy_ptr,  # dense in either memory format; or None, with the two below
        dm1_ptr,  # [B, C] float32 or float64
        dm2_ptr,
        mean_ptr,  # [C], with the three below
        variance_ptr,
        weight_ptr,  # or None
        bias_ptr,  # or None
        channels,
        pixels,
        NHWC: tl.constexpr,
        DY_NHWC: tl.constexpr,
        RELU: tl.constexpr,
        EPS: tl.constexpr,
        CHANNELS: tl.constexpr,
        PIXELS: tl.constexpr,
        SPAN: tl.constexpr,
    ):
        DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
        MASKED: tl.constexpr = RELU and dy_ptr is not None
        blocks = tl.cdiv(channels, CHANNELS)
        image = (tl.program_id(0) // blocks).to(tl.int64)
        channel = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
        there = channel < channels
        mean, scale, shift = layer_of(mean_ptr, variance_ptr, weight_ptr, bias_ptr, channel, there, EPS, DTYPE)
        count = tl.zeros([CHANNELS], DTYPE) + pixels
        level = tl.zeros([CHANNELS], DTYPE)
        slope = tl.zeros([CHANNELS], DTYPE)
        if dm1_ptr is not None:
            level = tl.load(dm1_ptr + image * channels + channel, mask=there, other=0.0).to(DTYPE) / count
        if dm2_ptr is not None:
            slope = 2.0 * tl.load(dm2_ptr + image * channels + channel, mask=there, other=0.0).to(DTYPE) / count
        first = tl.program_id(1) * SPAN
        for start in range(first, tl.minimum(first + SPAN, pixels), PIXELS):
            pixel = (start + tl.arange(0, PIXELS))[None, :]
            live = there[:, None] & (pixel < pixels)
            at = place_of(image, channel[:, None], pixel, channels, pixels, NHWC)
            dx = tl.zeros([CHANNELS, PIXELS], DTYPE) + level[:, None]
            if MASKED or dm2_ptr is not None:
                d = tl.load(x_ptr + at, mask=live, other=0.0).to(DTYPE) - mean[:, None]
                dx += slope[:, None] * d
            if dy_ptr is not None:
                its = place_of(image, channel[:, None], pixel, channels, pixels, DY_NHWC)
                dy = tl.load(dy_ptr + its, mask=live, other=0.0).to(DTYPE) * scale[:, None]
                if MASKED:  # by y as it was stored: a value that rounds to 0 is none above it
                    y = (d * scale[:, None] + shift[:, None]).to(x_ptr.dtype.element_ty)
                    dy = tl.where(y <= 0.0, 0.0, dy)
                dx += dy
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=live)


def tile_of(channels: int, pixels: int, nhwc: bool) -> tuple[int, int, int, int]:
    """Channels and pixels of a tile, pixels of a program, and warps; of the layer's size alone, never of the batch."""
    every, all_pixels = (1 << (size - 1).bit_length() for size in (channels, pixels))
    if nhwc:
        wide = min(every, max(CHANNELS, TILE // all_pixels))
        high = min(all_pixels, TILE // wide)
    else:
        high = min(all_pixels, TILE)
        wide = min(every, TILE // high)
    return wide, high, PROGRAM // wide, max(1, wide * high // WARP)


def _sizes_of(x: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    batch, channels, height, width = x.shape
    wide, high, span, warps = tile_of(channels, height * width, pixels_first(x))
    grid = batch * -(-channels // wide), -(-height * width // span)
    return grid, {"CHANNELS": wide, "PIXELS": high, "SPAN": span, "num_warps": warps, "NHWC": pixels_first(x)}


def launch(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    y, m1, m2 = results_of(x)
    if not batch:
        return y, m1, m2
    grid, sizes = _sizes_of(x)
    rows, parts = batch * channels, grid[1]
    into = (m1, m2) if parts == 1 else torch.empty((2, parts, rows), dtype=m1.dtype, device=x.device).unbind()
    _forward[grid](
        y, *into, x, running_mean, running_var, weight, bias, rows, channels, height * width,
        RELU=relu, EPS=eps, WHOLE=parts == 1, **sizes,
    )  # fmt: skip
    if parts > 1:
        several = min(PARTS, 1 << (parts - 1).bit_length())
        _added_up[(-(-rows // ROWS),)](m1, m2, *into, rows, parts, height * width, ROWS=ROWS, PARTS=several)
    return y, m1, m2


def launch_gradient(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
    of_y: Tensor | None,
    of_m1: Tensor | None,
    of_m2: Tensor | None,
) -> Tensor:
    dx = torch.empty_like(x)
    if not x.shape[0]:
        return dx
    of_y = None if of_y is None else flat(of_y)
    of_m1, of_m2 = (None if g is None else g.contiguous() for g in (of_m1, of_m2))
    grid, sizes = _sizes_of(x)
    _backward_kernel[grid](
        dx, x, of_y, of_m1, of_m2, running_mean, running_var, weight, bias, x.shape[1], x.shape[2] * x.shape[3],
        DY_NHWC=of_y is not None and pixels_first(of_y), RELU=relu, EPS=eps, **sizes,
    )  # fmt: skip
    return dx
