"""BatchNorm of a frozen network, with a ReLU where one follows, and the moments of what enters it: the map read once.

    d  = x - r                                       r, v: the layer's running mean and variance
    y  = relu(w d / sqrt(v + eps) + b)               arXiv:1502.03167, algorithm 2; the relu as asked
    m1 = mean_hw(d),   m2 = mean_hw(d^2)             per image and channel, as dfkd/synthesis/statistics.py defines them

    dx = dy [y > 0] w / sqrt(v + eps) + (dm1 + 2 dm2 d) / (H W)        the gradient of L_bn in the same pass

x, y and their gradients [B, C, H, W], moments [B, C]. Computed in float32, or float64 where x is. The difference comes
first, so that a map far from 0 keeps its digits. No gradient is taken in w, b, r and v.

Sums over a group of images follow from [B, C], a thousandth of a map. They are not formed here: a group may be cut into
several calls, and its statistics do not depend on how (dfkd/synthesis/statistics.py).
"""

from typing import Any

import torch
from torch import Tensor

from kernels.guided_clean import interpreted
from kernels.rows import flat, pixels_first

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only installation needs the reference alone
    triton = None

TILE, WARP = 4096, 512  # values that a program holds at a time, and those of a warp: sixteen a thread
PROGRAM = 16384  # values that a program goes through
CHANNELS = 64  # side by side in channels_last: 128 bytes of the narrowest dtype
PARTS, ROWS = 128, 32  # of the second launch: parts and rows of sums that are added up at a time
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def batch_norm_tap_ref(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, m1 and m2 of `batch_norm_tap` by their definitions, differentiable in x."""
    d, scale = _centred(x, running_mean), _scale(x, running_var, weight, eps)
    y = d * scale if bias is None else d * scale + _of_channels(bias, x)
    return (y.relu() if relu else y).to(x.dtype), d.mean((2, 3)), d.square().mean((2, 3))


def batch_norm_tap_gradient_ref(
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
    d = _centred(x, running_mean)
    found, pixels = torch.zeros_like(d), x.shape[2] * x.shape[3]
    if of_y is not None:
        found = of_y.to(d.dtype) * _scale(x, running_var, weight, eps)
        if relu:
            y, _, _ = batch_norm_tap_ref(x, running_mean, running_var, weight, bias, eps, relu)
            found = found.masked_fill(y <= 0, 0)
    if of_m1 is not None:
        found = found + (of_m1 / pixels)[:, :, None, None]
    if of_m2 is not None:
        found = found + (2 * of_m2 / pixels)[:, :, None, None] * d
    return found.to(x.dtype)


def _accumulated(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _of_channels(v: Tensor, x: Tensor) -> Tensor:
    return v.to(_accumulated(x))[None, :, None, None]


def _centred(x: Tensor, running_mean: Tensor) -> Tensor:
    return x.to(_accumulated(x)) - _of_channels(running_mean, x)


def _scale(x: Tensor, running_var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    scale = 1 / (_of_channels(running_var, x) + eps).sqrt()
    return scale if weight is None else scale * _of_channels(weight, x)


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


def _launch_sizes(x: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    batch, channels, height, width = x.shape
    wide, high, span, warps = tile_of(channels, height * width, pixels_first(x))
    grid = batch * -(-channels // wide), -(-height * width // span)
    return grid, {"CHANNELS": wide, "PIXELS": high, "SPAN": span, "num_warps": warps, "NHWC": pixels_first(x)}


def _launch(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    y, m1, m2 = _fake(x)
    if not batch:
        return y, m1, m2
    grid, sizes = _launch_sizes(x)
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


def _launch_gradient(
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
    grid, sizes = _launch_sizes(x)
    _backward_kernel[grid](
        dx, x, of_y, of_m1, of_m2, running_mean, running_var, weight, bias, x.shape[1], x.shape[2] * x.shape[3],
        DY_NHWC=of_y is not None and pixels_first(of_y), RELU=relu, EPS=eps, **sizes,
    )  # fmt: skip
    return dx


@torch.library.custom_op("dfkd::batch_norm_tap", mutates_args=())
def _operator(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, m1 and m2 [B, C]; x dense in one of the two memory formats, the layer's tensors contiguous."""
    if interpreted(x):
        return _launch(x, running_mean, running_var, weight, bias, eps, relu)
    y, m1, m2 = batch_norm_tap_ref(x, running_mean, running_var, weight, bias, eps, relu)
    return torch.empty_like(x).copy_(y), m1, m2


@torch.library.custom_op("dfkd::batch_norm_tap_gradient", mutates_args=())
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
    if interpreted(x):
        return _launch_gradient(*given)
    return torch.empty_like(x).copy_(batch_norm_tap_gradient_ref(*given))


_operator.register_kernel("cuda")(_launch)
_gradient_operator.register_kernel("cuda")(_launch_gradient)


@_operator.register_fake
def _fake(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    m1, m2 = (x.new_empty(x.shape[:2], dtype=_accumulated(x)) for _ in range(2))
    return torch.empty_like(x), m1, m2


@_gradient_operator.register_fake
def _(x: Tensor, *arguments: object) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.relu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # what nothing asks for is None, and not read


def _backward(ctx: Any, of_y: Tensor | None, of_m1: Tensor | None, of_m2: Tensor | None) -> tuple[Tensor | None, ...]:
    dx = _gradient_operator(*ctx.saved_tensors, ctx.eps, ctx.relu, of_y, of_m1, of_m2)
    return dx, None, None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup)


def batch_norm_tap(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x and moments m1, m2 [B, C], float32 or float64; differentiable once in x, which alone is kept for it.

    One launch, or two for maps of more than PROGRAM values in one program's channels, whose parts the second adds up.
    No atomics: the same bits every time, and an image's do not depend on its batch.

    Args:
        x: [B, C, H, W], float64, float32, float16 or bfloat16, C, H, W >= 1. Dense tensors in either memory format are
            read as they are, others are copied first; so with the gradient of y, in whichever format it comes.
        running_mean, running_var: [C], floating.
        weight, bias: [C], floating, or None; frozen.
        eps: added to the variance.
        relu: y is cut off below 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a tensor of the layer that requires a gradient.
        RuntimeError: Triton is not installed.
    """
    if triton is None:
        raise RuntimeError("Triton is not installed, and kernels=triton needs it. pip install triton")
    if x.dim() != 4 or x.dtype not in FLOATS or 0 in x.shape[1:]:
        raise ValueError(f"x: {tuple(x.shape)} {x.dtype}; want [B, C, H, W], C, H, W >= 1, floating")
    layer = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, tensor in layer.items():
        if tensor is None:
            continue
        if tensor.shape != x.shape[1:2] or tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype}; want ({x.shape[1]},), floating")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
        if tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, and none is taken in it: call requires_grad_(False)")
    plain = (tensor if tensor is None else tensor.contiguous() for tensor in layer.values())
    found: tuple[Tensor, Tensor, Tensor] = _operator(flat(x), *plain, eps, relu)
    return found
