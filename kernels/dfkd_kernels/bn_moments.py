# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""BatchNorm of a frozen network, with a ReLU where one follows, and the moments of what enters it: the map read once.

    d  = x - r                                       r, v: the layer's running mean and variance
    y  = relu(w d / sqrt(v + eps) + b)               arXiv:1502.03167, algorithm 2; the relu as asked
    m1 = mean_hw(d),   m2 = mean_hw(d^2)             per image and channel

    dx = dy [y > 0] w / sqrt(v + eps) + (dm1 + 2 dm2 d) / (H W)        the gradient of y and of the moments in one pass

x, y and their gradients [B, C, H, W], moments [B, C]. Computed in float32, or float64 where x is. The difference comes
first, so that a map far from 0 keeps its digits. No gradient is taken in w, b, r and v. Statistics of a group of
images, which the loss L_bn compares with r and v, follow from the moments: a thousandth of a map.
"""

from typing import Any

import torch
from torch import Tensor

from dfkd_kernels.common import (
    FLOATS,
    accumulated,
    dense,
    interpreted,
    is_nhwc,
    power_of_two,
    require,
    require_triton,
    tl,
    triton,
)

TILE, WARP = 4096, 512  # values that a program holds at a time, and those of a warp: sixteen a thread
PROGRAM = 16384  # values that a program goes through
CHANNELS = 64  # side by side in channels_last: 128 bytes of the narrowest dtype


def bn_moments_ref(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, m1 and m2 of `bn_moments` by their definitions, differentiable in x."""
    d, scale = _centred_and_scale(x, running_mean, running_var, weight, eps)
    y = d * scale if bias is None else d * scale + bias.to(d.dtype)[:, None, None]
    return (y.relu() if relu else y).to(x.dtype), d.mean((2, 3)), d.square().mean((2, 3))


def bn_moments_gradient_ref(
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
    """dx like x; of_y [B, C, H, W], of_m1 and of_m2 [B, C] are gradients, None for one of zeros."""
    d, scale = _centred_and_scale(x, running_mean, running_var, weight, eps)
    found, pixels = torch.zeros_like(d), x.shape[2] * x.shape[3]
    if of_y is not None:
        found = of_y.to(d.dtype) * scale
        if relu:
            y, _, _ = bn_moments_ref(x, running_mean, running_var, weight, bias, eps, relu)
            found = found.masked_fill(y <= 0, 0)
    if of_m1 is not None:
        found = found + (of_m1 / pixels)[:, :, None, None]
    if of_m2 is not None:
        found = found + (2 * of_m2 / pixels)[:, :, None, None] * d
    return found.to(x.dtype)


def _centred_and_scale(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """d [B, C, H, W] and w / sqrt(v + eps) [C, 1, 1]."""
    wide = accumulated(x)
    scale = (running_var.to(wide) + eps).rsqrt()
    scale = scale if weight is None else scale * weight.to(wide)
    return x.to(wide) - running_mean.to(wide)[:, None, None], scale[:, None, None]


if triton is not None:

    @triton.jit
    def _place(channels, CHANNELS: tl.constexpr):
        """A program's image, its channels [CHANNELS], and which of them there are."""
        blocks = tl.cdiv(channels, CHANNELS)
        channel = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
        return (tl.program_id(0) // blocks).to(tl.int64), channel, channel < channels

    @triton.jit
    def _layer(mean_ptr, variance_ptr, weight_ptr, bias_ptr, channel, there, EPS: tl.constexpr, DTYPE: tl.constexpr):
        """The running mean of channels, and factor and shift of the difference to it."""
        mean = tl.load(mean_ptr + channel, mask=there, other=0.0).to(DTYPE)
        variance = tl.load(variance_ptr + channel, mask=there, other=1.0).to(DTYPE) + EPS
        if variance.dtype == tl.float64:
            scale = 1.0 / tl.sqrt(variance)
        else:  # of float32 a GPU's plain root and quotient are approximations
            scale = tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance))
        if weight_ptr is not None:
            scale *= tl.load(weight_ptr + channel, mask=there, other=0.0).to(DTYPE)
        shift = tl.zeros(variance.shape, DTYPE)
        if bias_ptr is not None:
            shift = tl.load(bias_ptr + channel, mask=there, other=0.0).to(DTYPE)
        return mean[:, None], scale[:, None], shift[:, None]

    @triton.jit
    def _offsets(image, channel, pixel, channels, pixels, NHWC: tl.constexpr):
        """Where channels [C] and pixels [P] of an image lie in a dense map: [C, P]."""
        row, column = channel[:, None], pixel[None, :]
        return image * channels * pixels + (column * channels + row if NHWC else row * pixels + column)

    @triton.jit
    def _forward(
        y_ptr,  # [B, C, H, W], dense in either memory order, like x
        m1_ptr,  # [parts, B, C] float32 or float64: of each part its share in the moments
        m2_ptr,
        x_ptr,
        mean_ptr,  # [C], as are the three below
        variance_ptr,
        weight_ptr,  # or None
        bias_ptr,  # or None
        rows,  # B C
        channels,
        pixels,
        EPS: tl.constexpr,
        RELU: tl.constexpr,
        NHWC: tl.constexpr,
        CHANNELS: tl.constexpr,  # of a tile
        PIXELS: tl.constexpr,  # of a tile
        SPAN: tl.constexpr,  # pixels of a part
    ):
        DTYPE: tl.constexpr = m1_ptr.dtype.element_ty
        image, channel, there = _place(channels, CHANNELS)
        mean, scale, shift = _layer(mean_ptr, variance_ptr, weight_ptr, bias_ptr, channel, there, EPS, DTYPE)
        m1 = tl.zeros([CHANNELS, PIXELS], DTYPE)
        m2 = tl.zeros([CHANNELS, PIXELS], DTYPE)
        first = tl.program_id(1) * SPAN
        for start in range(first, tl.minimum(first + SPAN, pixels), PIXELS):
            pixel = start + tl.arange(0, PIXELS)
            live = there[:, None] & (pixel < pixels)[None, :]
            at = _offsets(image, channel, pixel, channels, pixels, NHWC)
            d = tl.where(live, tl.load(x_ptr + at, mask=live, other=0.0).to(DTYPE) - mean, 0.0)
            m1 += d
            m2 += d * d
            y = d * scale + shift
            if RELU:
                y = tl.where(y < 0.0, 0.0, y)  # NaN stays
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=live)
        count = tl.zeros([CHANNELS], DTYPE) + pixels
        row = tl.program_id(1).to(tl.int64) * rows + image * channels + channel
        tl.store(m1_ptr + row, tl.sum(m1, 1) / count, mask=there)
        tl.store(m2_ptr + row, tl.sum(m2, 1) / count, mask=there)

    @triton.jit
    def _backward(
        dx_ptr,  # [B, C, H, W], as are x and dy, in one memory order
        x_ptr,
        dy_ptr,  # or None, as are the two below
        dm1_ptr,  # [B, C] float32 or float64
        dm2_ptr,
        mean_ptr,  # [C], as are the three below
        variance_ptr,
        weight_ptr,  # or None
        bias_ptr,  # or None
        channels,
        pixels,
        EPS: tl.constexpr,
        RELU: tl.constexpr,
        NHWC: tl.constexpr,
        CHANNELS: tl.constexpr,
        PIXELS: tl.constexpr,
        SPAN: tl.constexpr,
    ):
        DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
        MASKED: tl.constexpr = RELU and dy_ptr is not None
        image, channel, there = _place(channels, CHANNELS)
        mean, scale, shift = _layer(mean_ptr, variance_ptr, weight_ptr, bias_ptr, channel, there, EPS, DTYPE)
        count = tl.zeros([CHANNELS], DTYPE) + pixels
        level = tl.zeros([CHANNELS], DTYPE)
        slope = tl.zeros([CHANNELS], DTYPE)
        if dm1_ptr is not None:
            level = tl.load(dm1_ptr + image * channels + channel, mask=there, other=0.0).to(DTYPE) / count
        if dm2_ptr is not None:
            slope = 2.0 * tl.load(dm2_ptr + image * channels + channel, mask=there, other=0.0).to(DTYPE) / count
        first = tl.program_id(1) * SPAN
        for start in range(first, tl.minimum(first + SPAN, pixels), PIXELS):
            pixel = start + tl.arange(0, PIXELS)
            live = there[:, None] & (pixel < pixels)[None, :]
            at = _offsets(image, channel, pixel, channels, pixels, NHWC)
            dx = tl.zeros([CHANNELS, PIXELS], DTYPE) + level[:, None]
            if MASKED or dm2_ptr is not None:
                d = tl.load(x_ptr + at, mask=live, other=0.0).to(DTYPE) - mean
                dx += slope[:, None] * d
            if dy_ptr is not None:
                dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(DTYPE) * scale
                if MASKED:  # by y as it was stored: a value that rounds to 0 is none above it
                    dy = tl.where((d * scale + shift).to(x_ptr.dtype.element_ty) <= 0.0, 0.0, dy)
                dx += dy
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=live)


def tile_of(channels: int, pixels: int, nhwc: bool) -> tuple[int, int, int]:
    """Channels and pixels of a tile, pixels of a part; of the layer's size alone, never of the batch."""
    every, all_pixels = power_of_two(channels), power_of_two(pixels)
    if nhwc:
        wide = min(every, max(CHANNELS, TILE // all_pixels))
        high = min(all_pixels, TILE // wide)
    else:
        high = min(all_pixels, TILE)
        wide = min(every, TILE // high)
    return wide, high, PROGRAM // wide


def _cut(x: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid for a map: channel blocks of all images, parts of their pixels; and the kernels' constants."""
    batch, channels, height, width = x.shape
    wide, high, span = tile_of(channels, height * width, is_nhwc(x))
    grid = batch * -(-channels // wide), -(-height * width // span)
    warps = max(1, wide * high // WARP)
    return grid, {"CHANNELS": wide, "PIXELS": high, "SPAN": span, "NHWC": is_nhwc(x), "num_warps": warps}


def _launch(x: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`_operator` on a GPU, or in Triton's interpreter."""
    *layer, eps, relu = given
    (batch, channels, height, width), (grid, constants) = x.shape, _cut(x)
    y, parts = torch.empty_like(x), (grid[1], batch, channels)
    m1, m2 = (x.new_empty(parts, dtype=accumulated(x)) for _ in range(2))
    if not batch:
        return y, m1[0], m2[0]
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        rows, pixels = batch * channels, height * width
        _forward[grid](y, m1, m2, x, *layer, rows, channels, pixels, EPS=eps, RELU=relu, **constants)
    return (y, m1[0], m2[0]) if len(m1) == 1 else (y, m1.sum(0), m2.sum(0))


def _launch_gradient(x: Tensor, *given: Any) -> Tensor:
    """`_gradient_operator` on a GPU, or in Triton's interpreter."""
    dx = torch.empty_like(x)
    if not len(x):
        return dx
    *layer, eps, relu, of_y, of_m1, of_m2 = given
    of_y = None if of_y is None else dense(of_y, is_nhwc(x))
    of_m1, of_m2 = (None if g is None else g.contiguous() for g in (of_m1, of_m2))
    channels, pixels, (grid, constants) = x.shape[1], x.shape[2] * x.shape[3], _cut(x)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _backward[grid](dx, x, of_y, of_m1, of_m2, *layer, channels, pixels, EPS=eps, RELU=relu, **constants)
    return dx


@torch.library.custom_op("dfkd::bn_moments", mutates_args=())
def _operator(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, m1 and m2 [B, C]; x dense in one of the two memory orders, the layer's tensors contiguous."""
    if interpreted(x):
        return _launch(x, running_mean, running_var, weight, bias, eps, relu)
    y, m1, m2 = bn_moments_ref(x, running_mean, running_var, weight, bias, eps, relu)
    return torch.empty_like(x).copy_(y), m1, m2


@torch.library.custom_op("dfkd::bn_moments_gradient", mutates_args=())
def _gradient_operator(
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
    """dx like x. Has no gradient of its own, so that autograd refuses a second derivative."""
    given = (x, running_mean, running_var, weight, bias, eps, relu, of_y, of_m1, of_m2)
    return _launch_gradient(*given) if interpreted(x) else torch.empty_like(x).copy_(bn_moments_gradient_ref(*given))


_operator.register_kernel("cuda")(_launch)
_gradient_operator.register_kernel("cuda")(_launch_gradient)


@_operator.register_fake
def _fake(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    m1, m2 = (x.new_empty(x.shape[:2], dtype=accumulated(x)) for _ in range(2))
    return torch.empty_like(x), m1, m2


@_gradient_operator.register_fake
def _(x: Tensor, *arguments: object) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.relu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # what nothing asks for is None, and not read


def _of_x(ctx: Any, of_y: Tensor | None, of_m1: Tensor | None, of_m2: Tensor | None) -> tuple[Tensor | None, ...]:
    dx = _gradient_operator(*ctx.saved_tensors, ctx.eps, ctx.relu, of_y, of_m1, of_m2)
    return dx, None, None, None, None, None, None


_operator.register_autograd(_of_x, setup_context=_setup)


def bn_moments(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x and moments m1, m2 [B, C], float32 or float64; differentiable once in x, which alone is kept for it.

    One launch; maps of more than PROGRAM values in one program's channels leave sums of several parts, which PyTorch
    adds up. No atomics, so the same bits every time.

    Args:
        x: [B, C, H, W], float64, float32, float16 or bfloat16, C, H, W >= 1. Dense tensors in either memory format are
            read as they are, others are copied first; the gradient of y is copied unless it lies as x does.
        running_mean, running_var: [C], floating.
        weight, bias: [C], floating, or None; frozen.
        eps: added to the variance.
        relu: y is cut off below 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a tensor of the layer that requires a gradient.
        RuntimeError: Triton is not installed.
    """
    require_triton()
    if x.dim() != 4 or x.dtype not in FLOATS or 0 in x.shape[1:]:
        raise ValueError(f"x: {tuple(x.shape)} {x.dtype}; want [B, C, H, W], C, H, W >= 1, floating")
    layer = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, tensor in layer.items():
        require(name, tensor, x.shape[1:2], FLOATS, x)
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, and none is taken in it: call requires_grad_(False)")
    plain = (None if tensor is None else tensor.contiguous() for tensor in layer.values())
    found: tuple[Tensor, Tensor, Tensor] = _operator(dense(x, is_nhwc(x)), *plain, eps, relu)
    return found
