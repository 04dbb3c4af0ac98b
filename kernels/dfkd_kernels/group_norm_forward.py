"""Group normalisation forward, as kernels/group_norm_silu.py defines it: one launch, or three where groups are large.

_whole       a program has a group in its registers
_moments     mean and sum of squared deviations of every channel in a chunk of pixels, Welford's way
_statistics  those of a group's chunks and channels in one; Chan, Golub and LeVeque 1983, equation 2.1
_apply       the normalised values
"""

from torch import Tensor

from dfkd_kernels.group_norm_tiles import Cut, accumulated, like, pixels_first, walkable

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only installation needs the reference alone
    triton = None
else:
    from dfkd_kernels.group_norm_tiles import corner, group_of, of_channels, of_groups, place, within

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def activated(v, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
        return v * tl.sigmoid(v) if SILU else v

    @triton.jit  # type: ignore[untyped-decorator]
    def _whole(  # type: ignore[no-untyped-def]
        y_ptr,  # like x
        mean_ptr,  # [B, G] float32 or float64
        rstd_ptr,  # likewise
        x_ptr,  # [B, C, ...], dense in the order of NHWC
        weight_ptr,  # [C]
        bias_ptr,  # [C]
        EPS: tl.constexpr,
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
        COUNT: tl.constexpr = PIXELS * (CHANNELS // GROUPS) * 1.0
        mean = tl.sum(tl.sum(x, 1), 0) / COUNT
        x = tl.where(live, x - mean, 0.0)
        rest = tl.sum(tl.sum(x, 1), 0) / COUNT  # what the rounding of a large mean left
        x = tl.where(live, x - rest, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(x * x, 1), 0) / COUNT + EPS)
        w = of_channels(weight_ptr, channel, CHANNELS, DTYPE)
        y = activated(x * rstd * w + of_channels(bias_ptr, channel, CHANNELS, DTYPE), SILU)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=live)
        tl.store(mean_ptr + tl.program_id(0), mean + rest)
        tl.store(rstd_ptr + tl.program_id(0), rstd)

    @triton.jit  # type: ignore[untyped-decorator]
    def _moments(  # type: ignore[no-untyped-def]
        part_ptr,  # [B, 2, chunks, C]: means, and sums of squared deviations; float32 or float64
        x_ptr,
        PIXELS: tl.constexpr,
        CHUNKS: tl.constexpr,
        CHANNELS: tl.constexpr,
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
        there = (block * WIDE + column < CHANNELS)[None, :]
        x_ptr += corner(image, first, block * WIDE, PIXELS, CHANNELS, NHWC)
        mean = tl.zeros([HIGH, WIDE], DTYPE)
        squares = tl.zeros([HIGH, WIDE], DTYPE)
        n = tl.zeros([1, 1], DTYPE)
        for step in range(STEPS):
            pixel = step * HIGH + row
            live = (first + pixel < PIXELS)[:, None] & there
            x = tl.load(x_ptr + within(pixel, column, PIXELS, CHANNELS, NHWC), mask=live, other=0.0).to(DTYPE)
            away = tl.where(live, x - mean, 0.0)
            n += 1.0
            mean += away * (1.0 / n)
            squares += away * (x - mean)
        # each row of the tile had `seen` pixels of `count`; their moments in one, about a mean that is corrected once
        seen = tl.minimum(tl.maximum((PIXELS - first - row + HIGH - 1) // HIGH, 0), STEPS).to(DTYPE)[:, None]
        count = tl.minimum(PIXELS - first, STEPS * HIGH).to(DTYPE)
        middle = tl.sum(seen * mean, 0) / count
        away = mean - middle[None, :]
        rest = tl.sum(seen * away, 0) / count
        squares = tl.sum(squares + seen * away * away, 0) - count * rest * rest
        part_ptr += (image * 2 * CHUNKS + chunk) * CHANNELS + block * WIDE
        tl.store(part_ptr + column, middle + rest, mask=block * WIDE + column < CHANNELS)
        tl.store(part_ptr + CHUNKS * CHANNELS + column, squares, mask=block * WIDE + column < CHANNELS)

    @triton.jit  # type: ignore[untyped-decorator]
    def _statistics(  # type: ignore[no-untyped-def]
        mean_ptr,  # [B, G]
        rstd_ptr,
        part_ptr,  # of _moments
        EPS: tl.constexpr,
        PIXELS: tl.constexpr,
        CHUNKS: tl.constexpr,
        SPAN: tl.constexpr,  # pixels of a chunk; the last may have fewer
        CHANNELS: tl.constexpr,
        GROUPS: tl.constexpr,
        HIGH: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
        WIDTH: tl.constexpr = CHANNELS // GROUPS
        group, image = tl.program_id(0) % GROUPS, (tl.program_id(0) // GROUPS).to(tl.int64)
        part_ptr += image * 2 * CHUNKS * CHANNELS + group * WIDTH
        row, column = tl.arange(0, HIGH), tl.arange(0, WIDE)
        COUNT: tl.constexpr = PIXELS * WIDTH * 1.0
        pivot = tl.load(part_ptr)  # differences from it keep the digits that a large mean has no room for
        shift = tl.zeros([HIGH, WIDE], DTYPE)
        for start in range(0, CHUNKS, HIGH):
            chunk = start + row
            live = (chunk < CHUNKS)[:, None] & (column < WIDTH)[None, :]
            count = tl.minimum(PIXELS - chunk * SPAN, SPAN).to(DTYPE)[:, None]
            mean = tl.load(part_ptr + chunk[:, None] * CHANNELS + column[None, :], mask=live, other=0.0)
            shift += tl.where(live, count * (mean - pivot), 0.0)
        centre = tl.sum(tl.sum(shift, 1), 0) / COUNT
        squares = tl.zeros([HIGH, WIDE], DTYPE)
        for start in range(0, CHUNKS, HIGH):
            chunk = start + row
            live = (chunk < CHUNKS)[:, None] & (column < WIDTH)[None, :]
            count = tl.minimum(PIXELS - chunk * SPAN, SPAN).to(DTYPE)[:, None]
            at = part_ptr + chunk[:, None] * CHANNELS + column[None, :]
            away = tl.load(at, mask=live, other=0.0) - pivot - centre
            own = tl.load(at + CHUNKS * CHANNELS, mask=live, other=0.0)
            squares += tl.where(live, own + count * away * away, 0.0)
        tl.store(mean_ptr + tl.program_id(0), pivot + centre)
        tl.store(rstd_ptr + tl.program_id(0), 1.0 / tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / COUNT + EPS))

    @triton.jit  # type: ignore[untyped-decorator]
    def _apply(  # type: ignore[no-untyped-def]
        y_ptr,
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
        DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
        # backwards: what _moments read last is in the cache still
        block, chunk, image = place(tl.num_programs(0) - 1 - tl.program_id(0), CHUNKS, BLOCKS)
        first = chunk * (STEPS * HIGH)
        row, column = tl.arange(0, HIGH), tl.arange(0, WIDE)
        channel = block * WIDE + column
        mean = of_groups(mean_ptr, image, channel, CHANNELS, GROUPS)
        scale = of_groups(rstd_ptr, image, channel, CHANNELS, GROUPS) * of_channels(
            weight_ptr, channel, CHANNELS, DTYPE
        )
        b = of_channels(bias_ptr, channel, CHANNELS, DTYPE)
        start = corner(image, first, block * WIDE, PIXELS, CHANNELS, NHWC)
        for step in range(STEPS):
            pixel = step * HIGH + row
            live = (first + pixel < PIXELS)[:, None] & (channel < CHANNELS)[None, :]
            at = within(pixel, column, PIXELS, CHANNELS, NHWC)
            x = tl.load(x_ptr + start + at, mask=live, other=0.0).to(DTYPE)
            y = activated((x - mean) * scale + b, SILU)
            tl.store(y_ptr + start + at, y.to(y_ptr.dtype.element_ty), mask=live)


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the order of x, mean and rstd [B, G]."""
    y, nhwc = like(x), pixels_first(x)
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=accumulated(x)) for _ in range(2))
    if not x.numel():
        return y, mean, rstd
    cut = Cut(x, groups, nhwc)
    x, weights = walkable(x, nhwc), (weight.contiguous(), bias.contiguous())
    if cut.tile.whole:
        _whole[cut.groups](y, mean, rstd, x, *weights, EPS=eps, SILU=silu, **cut.whole)
        return y, mean, rstd
    part = cut.parts(mean)
    _moments[cut.programs](part, x, **cut.tiles)
    _statistics[cut.groups](mean, rstd, part, EPS=eps, SPAN=cut.tile.steps * cut.tile.pixels, **cut.combining)
    _apply[cut.programs](y, x, mean, rstd, *weights, GROUPS=groups, SILU=silu, **cut.tiles)
    return y, mean, rstd
