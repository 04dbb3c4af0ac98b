# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""Triton kernels of group normalisation with SiLU (equations: group_norm_silu.py), forward and gradient.

A group that fits a program's registers is one program's, and its values are read once:

    whole, whole_backward

A larger one is cut into tiles [pixels, channels] over many programs, and read again once its statistics are known:

    moments     mean and sum of squared deviations of every channel in a span of pixels
    statistics  a group's spans and channels combined; Chan, Golub and LeVeque 1983, equation 2.1
    apply       the normalised values
    backward    sums of g and g xh of every channel in a span, which PyTorch adds up; launched again with them, dx
"""

from dfkd_kernels.common import tl, triton


@triton.jit
def _offsets(pixel, channel, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, NHWC: tl.constexpr):
    """Offsets of an image's elements in memory, and the mask of those that exist, both [pixels, channels].

    Offsets are 64 bits wide where an image has more elements than 32 bits count.
    """
    live = (pixel < PIXELS)[:, None] & (channel < CHANNELS)[None, :]
    if PIXELS * CHANNELS > 2147483647:
        pixel, channel = pixel.to(tl.int64), channel.to(tl.int64)
    if NHWC:
        return pixel[:, None] * CHANNELS + channel[None, :], live
    else:
        return channel[None, :] * PIXELS + pixel[:, None], live


@triton.jit
def _group(
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    NHWC: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A program's whole group: offsets from the map's first value, which there are, and its channels."""
    WIDTH: tl.constexpr = CHANNELS // GROUPS
    group, image = tl.program_id(0) % GROUPS, (tl.program_id(0) // GROUPS).to(tl.int64)
    column = tl.arange(0, WIDE)
    at, live = _offsets(tl.arange(0, HIGH), group * WIDTH + column, PIXELS, CHANNELS, NHWC)
    return image * PIXELS * CHANNELS + at, live & (column < WIDTH)[None, :], group * WIDTH + column


@triton.jit
def _place(WIDE: tl.constexpr, SPAN: tl.constexpr, BACKWARDS: tl.constexpr):
    """A program's image, its channels, and its first pixel. Backwards: what was read last is in the cache still."""
    span, image = tl.program_id(1), tl.program_id(2)
    if BACKWARDS:
        span, image = tl.num_programs(1) - 1 - span, tl.num_programs(2) - 1 - image
    return image.to(tl.int64), tl.program_id(0) * WIDE + tl.arange(0, WIDE), span * SPAN


@triton.jit
def _of_channels(ptr, channel, CHANNELS: tl.constexpr, DTYPE: tl.constexpr):
    """A weight of each channel, [1, channels]."""
    return tl.load(ptr + channel, mask=channel < CHANNELS, other=0.0).to(DTYPE)[None, :]


@triton.jit
def _of_groups(ptr, channel, CHANNELS: tl.constexpr, GROUPS: tl.constexpr):
    """For each channel what an image's groups [G] have, [1, channels]."""
    return tl.load(ptr + channel // (CHANNELS // GROUPS), mask=channel < CHANNELS, other=0.0)[None, :]


@triton.jit
def _activated(v, SILU: tl.constexpr):
    return v * tl.sigmoid(v) if SILU else v


@triton.jit
def _before_affine(dy, xh, w, b, SILU: tl.constexpr):
    """The gradient in the normalised values: dy act'(v) w, v = w xh + b."""
    if SILU:
        v = xh * w + b
        s = tl.sigmoid(v)
        dy = dy * (s * (1.0 + v * (1.0 - s)))
    return dy * w


@triton.jit
def whole(
    y_ptr,  # like x
    mean_ptr,  # [B, G] float32 or float64, as is the one below
    rstd_ptr,
    x_ptr,  # [B, C, ...], dense in the order that NHWC says
    weight_ptr,  # [C], as is the one below
    bias_ptr,
    EPS: tl.constexpr,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    NHWC: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
):
    DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
    COUNT: tl.constexpr = PIXELS * (CHANNELS // GROUPS) * 1.0
    at, live, channel = _group(PIXELS, CHANNELS, GROUPS, NHWC, HIGH, WIDE)
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(DTYPE)
    mean = tl.sum(tl.sum(x, 1), 0) / COUNT
    x = tl.where(live, x - mean, 0.0)
    rest = tl.sum(tl.sum(x, 1), 0) / COUNT  # what the rounding of a large mean left
    x = tl.where(live, x - rest, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(x * x, 1), 0) / COUNT + EPS)
    w, b = _of_channels(weight_ptr, channel, CHANNELS, DTYPE), _of_channels(bias_ptr, channel, CHANNELS, DTYPE)
    y = _activated(x * rstd * w + b, SILU)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=live)
    tl.store(mean_ptr + tl.program_id(0), mean + rest)
    tl.store(rstd_ptr + tl.program_id(0), rstd)


@triton.jit
def whole_backward(
    dx_ptr,  # like x, as is the one below
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    NHWC: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
):
    DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
    COUNT: tl.constexpr = PIXELS * (CHANNELS // GROUPS) * 1.0
    at, live, channel = _group(PIXELS, CHANNELS, GROUPS, NHWC, HIGH, WIDE)
    mean, rstd = tl.load(mean_ptr + tl.program_id(0)), tl.load(rstd_ptr + tl.program_id(0))
    xh = (tl.load(x_ptr + at, mask=live, other=0.0).to(DTYPE) - mean) * rstd
    dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(DTYPE)  # 0 where nothing is, and so are its products
    w, b = _of_channels(weight_ptr, channel, CHANNELS, DTYPE), _of_channels(bias_ptr, channel, CHANNELS, DTYPE)
    g = _before_affine(dy, xh, w, b, SILU)
    plain, along = tl.sum(tl.sum(g, 1), 0) / COUNT, tl.sum(tl.sum(g * xh, 1), 0) / COUNT
    dx = (g - plain - xh * along) * rstd
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=live)


@triton.jit
def moments(
    part_ptr,  # [B, spans, 2, C]: means, and sums of squared deviations; float32 or float64
    x_ptr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NHWC: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    SPAN: tl.constexpr,
):
    DTYPE: tl.constexpr = part_ptr.dtype.element_ty
    image, channel, first = _place(WIDE, SPAN, False)
    x_ptr += image * PIXELS * CHANNELS
    mean = tl.zeros([WIDE], DTYPE)
    squares = tl.zeros([WIDE], DTYPE)
    for start in range(first, tl.minimum(first + SPAN, PIXELS), HIGH):
        at, live = _offsets(start + tl.arange(0, HIGH), channel, PIXELS, CHANNELS, NHWC)
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(DTYPE)
        n = tl.zeros([WIDE], DTYPE) + tl.minimum(PIXELS - start, HIGH)
        middle = tl.sum(x, 0) / n
        away = tl.where(live, x - middle[None, :], 0.0)
        rest = tl.sum(away, 0) / n  # what the rounding of a large mean left
        apart = middle + rest - mean
        share = n / (n + (start - first))  # of this tile in what is known after it
        mean += share * apart
        squares += tl.sum(away * away, 0) - n * rest * rest + share * (start - first) * apart * apart
    part_ptr += ((image * tl.num_programs(1) + tl.program_id(1)) * 2) * CHANNELS
    tl.store(part_ptr + channel, mean, mask=channel < CHANNELS)
    tl.store(part_ptr + CHANNELS + channel, squares, mask=channel < CHANNELS)


@triton.jit
def statistics(
    mean_ptr,  # [B, G], as is the one below
    rstd_ptr,
    part_ptr,  # of moments
    EPS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    SPAN: tl.constexpr,
    HIGH: tl.constexpr,  # spans at a time
    WIDE: tl.constexpr,  # at least the channels of a group
):
    WIDTH: tl.constexpr = CHANNELS // GROUPS
    SPANS: tl.constexpr = (PIXELS + SPAN - 1) // SPAN
    COUNT: tl.constexpr = PIXELS * WIDTH * 1.0
    group, image = tl.program_id(0) % GROUPS, (tl.program_id(0) // GROUPS).to(tl.int64)
    part_ptr += image * SPANS * 2 * CHANNELS + group * WIDTH
    column = tl.arange(0, WIDE)[None, :]
    pivot = tl.load(part_ptr).to(tl.float64)  # differences from it are of the deviation's size, whatever the mean
    shift = tl.zeros([HIGH, WIDE], tl.float64)
    squares = tl.zeros([HIGH, WIDE], tl.float64)
    for start in range(0, SPANS, HIGH):
        span = start + tl.arange(0, HIGH)[:, None]
        live = (span < SPANS) & (column < WIDTH)
        at = part_ptr + span * 2 * CHANNELS + column
        n = tl.minimum(PIXELS - span * SPAN, SPAN).to(tl.float64)
        away = tl.where(live, tl.load(at, mask=live, other=0.0).to(tl.float64) - pivot, 0.0)
        shift += n * away
        squares += tl.load(at + CHANNELS, mask=live, other=0.0).to(tl.float64) + n * away * away
    centre = tl.sum(tl.sum(shift, 1), 0) / COUNT
    variance = tl.sum(tl.sum(squares, 1), 0) / COUNT - centre * centre  # of float64: exact beside the parts' rounding
    tl.store(mean_ptr + tl.program_id(0), (pivot + centre).to(mean_ptr.dtype.element_ty))
    tl.store(rstd_ptr + tl.program_id(0), (1.0 / tl.sqrt(variance + EPS)).to(rstd_ptr.dtype.element_ty))


@triton.jit
def apply(
    y_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    NHWC: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    SPAN: tl.constexpr,
):
    DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
    image, channel, first = _place(WIDE, SPAN, True)
    start_of_image = image * PIXELS * CHANNELS
    mean = _of_groups(mean_ptr + image * GROUPS, channel, CHANNELS, GROUPS)
    scale = _of_groups(rstd_ptr + image * GROUPS, channel, CHANNELS, GROUPS)
    scale *= _of_channels(weight_ptr, channel, CHANNELS, DTYPE)
    b = _of_channels(bias_ptr, channel, CHANNELS, DTYPE)
    for start in range(first, tl.minimum(first + SPAN, PIXELS), HIGH):
        at, live = _offsets(start + tl.arange(0, HIGH), channel, PIXELS, CHANNELS, NHWC)
        x = tl.load(x_ptr + start_of_image + at, mask=live, other=0.0).to(DTYPE)
        y = _activated((x - mean) * scale + b, SILU).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + start_of_image + at, y, mask=live)


@triton.jit
def backward(
    out_ptr,  # dx; or, where sums are None, [B, spans, 2, C]: a span's shares in <g> and <g xh>
    sums_ptr,  # [B, 2, G]: <g> and <g xh>, or None
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    NHWC: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    SPAN: tl.constexpr,
):
    DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
    image, channel, first = _place(WIDE, SPAN, sums_ptr is not None)
    start_of_image = image * PIXELS * CHANNELS  # added to pointers, so that a tile's offsets are of 32 bits
    mean = _of_groups(mean_ptr + image * GROUPS, channel, CHANNELS, GROUPS)
    rstd = _of_groups(rstd_ptr + image * GROUPS, channel, CHANNELS, GROUPS)
    w, b = _of_channels(weight_ptr, channel, CHANNELS, DTYPE), _of_channels(bias_ptr, channel, CHANNELS, DTYPE)
    if sums_ptr is None:
        plain = tl.zeros([HIGH, WIDE], DTYPE)
        along = tl.zeros([HIGH, WIDE], DTYPE)
    else:
        plain = _of_groups(sums_ptr + image * 2 * GROUPS, channel, CHANNELS, GROUPS)
        along = _of_groups(sums_ptr + image * 2 * GROUPS + GROUPS, channel, CHANNELS, GROUPS)
    for start in range(first, tl.minimum(first + SPAN, PIXELS), HIGH):
        at, live = _offsets(start + tl.arange(0, HIGH), channel, PIXELS, CHANNELS, NHWC)
        xh = (tl.load(x_ptr + start_of_image + at, mask=live, other=0.0).to(DTYPE) - mean) * rstd
        dy = tl.load(dy_ptr + start_of_image + at, mask=live, other=0.0).to(DTYPE)
        g = _before_affine(dy, xh, w, b, SILU)
        if sums_ptr is None:
            plain += g
            along += g * xh
        else:
            dx = (g - plain - xh * along) * rstd
            tl.store(out_ptr + start_of_image + at, dx.to(out_ptr.dtype.element_ty), mask=live)
    if sums_ptr is None:
        COUNT: tl.constexpr = PIXELS * (CHANNELS // GROUPS) * 1.0
        out_ptr += ((image * tl.num_programs(1) + tl.program_id(1)) * 2) * CHANNELS
        tl.store(out_ptr + channel, tl.sum(plain, 0) / COUNT, mask=channel < CHANNELS)
        tl.store(out_ptr + CHANNELS + channel, tl.sum(along, 0) / COUNT, mask=channel < CHANNELS)
