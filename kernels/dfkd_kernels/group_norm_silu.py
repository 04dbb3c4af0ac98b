"""Group normalisation with the activation behind it, and the gradient in its input, for frozen weights.

    xh = (x - mean) / sqrt(var + eps)                     per image and group, biased variance; arXiv:1803.08494
    y  = act(v), v = w xh + b                             act(v) = v sigmoid(v), or v
    g  = dy act'(v) w,  act'(v) = s (1 + v (1 - s)),      s = sigmoid(v)
    dx = (g - <g> - xh <g xh>) / sqrt(var + eps)          <.>: the mean over an image's group

x, y, dy, dx [B, C, ...]; w, b [C]; mean and 1 / sqrt(var + eps) [B, G] are all that is kept beside x. Computed in
float32, or float64 where x is. The variance is never a difference of squares, which a large mean would cancel.

What must move is x once and y once, in the gradient dy, x and dx. A group that fits a program (see `tiling`)
moves no more; a larger one is read twice. Feature maps lie in either memory order, NCHW or NHWC, and results in that
of x. How a map is cut does not depend on the batch. The kernels are in group_norm_kernels.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_kernels.common import (
    FLOATS,
    accumulated,
    dense,
    empty_like,
    interpreted,
    is_nhwc,
    power_of_two,
    require,
    require_triton,
    triton,
)

if triton is not None:
    from dfkd_kernels import group_norm_kernels as kernels

WHOLE = 8192  # values of the largest group that one program keeps: sixteen a thread, of x and of the gradient
TILE = 4096  # sixteen values a thread of eight warps: two 128-bit loads of a half in flight, four of float32
WIDE = 64  # channels of an NHWC tile: whole 128-byte lines, and pixels enough that what a span leaves is small
STEPS = 8  # most tiles of a program
PROGRAMS = 128  # an image is cut over this many before a program takes more than one tile
PARTS = 2048  # parts that are combined at a time


@dataclass(frozen=True)
class Tiling:
    """How one image [pixels, channels] is cut.

    whole: a program takes a group, in one tile.
    high, wide: pixels and channels of a tile, powers of two.
    span: pixels that a program goes through, a tile at a time.
    """

    pixels: int
    channels: int
    groups: int
    nhwc: bool
    whole: bool
    high: int
    wide: int
    span: int
    warps: int = 8

    @property
    def spans(self) -> int:
        return -(-self.pixels // self.span)

    def tiles(self) -> dict[str, Any]:
        """Constants of the kernels that walk in tiles; GROUPS and SPAN are given beside them."""
        map_of = {"PIXELS": self.pixels, "CHANNELS": self.channels, "NHWC": self.nhwc}
        return {**map_of, "HIGH": self.high, "WIDE": self.wide, "num_warps": self.warps}

    def combining(self) -> dict[str, Any]:
        """Compile-time constants of `group_norm_kernels.statistics`, which combines the parts of an image's spans."""
        wide = power_of_two(self.channels // self.groups)
        high = min(max(PARTS // wide, 1), power_of_two(self.spans))
        map_of = {"PIXELS": self.pixels, "CHANNELS": self.channels, "GROUPS": self.groups, "SPAN": self.span}
        return {**map_of, "HIGH": high, "WIDE": wide, "num_warps": self.warps}


def tiling(channels: int, groups: int, pixels: int, nhwc: bool) -> Tiling:
    image = (pixels, channels, groups, nhwc)
    high, wide = power_of_two(pixels), power_of_two(channels // groups)
    if high * wide <= WHOLE:
        return Tiling(*image, True, high, wide, high, min(max(high * wide // 512, 1), 16))
    if nhwc:
        wide = min(power_of_two(channels), WIDE)
        high = TILE // wide
    else:
        high = min(high, TILE)
        wide = min(TILE // high, power_of_two(channels))
    tiles = -(-pixels // high)
    programs = -(-channels // wide) * tiles
    return Tiling(*image, False, high, wide, high * min(max(programs // PROGRAMS, 1), STEPS, tiles))


def group_norm_silu_ref(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, silu: bool = True
) -> Tensor:
    """`group_norm_silu` in PyTorch, differentiable as often as wanted, in the weights too."""
    wide = accumulated(x)
    v = torch.group_norm(x.to(wide), groups, weight.to(wide), bias.to(wide), eps)
    return (F.silu(v) if silu else v).to(x.dtype)


def _tiling_of(x: Tensor, groups: int) -> tuple[Tiling, tuple[int, int, int]]:
    """How a map [B, C, ...] is cut, and the grid of the kernels that walk in tiles: channel blocks, spans, images."""
    images, channels = x.shape[:2]
    cut = tiling(channels, groups, x.numel() // (images * channels), is_nhwc(x))
    return cut, (-(-channels // cut.wide), cut.spans, images)


def _launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the order of x, mean and 1 / sqrt(var + eps) [B, G]."""
    y, nhwc = empty_like(x), is_nhwc(x)
    mean, rstd = (x.new_empty(len(x), groups, dtype=accumulated(x)) for _ in range(2))
    if not x.numel():
        return y, mean, rstd
    cut, grid = _tiling_of(x, groups)
    x, weights = dense(x, nhwc), (weight.contiguous(), bias.contiguous())
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        if cut.whole:
            kernels.whole[(mean.numel(),)](y, mean, rstd, x, *weights, EPS=eps, SILU=silu, GROUPS=groups, **cut.tiles())
            return y, mean, rstd
        part = mean.new_empty(len(x), cut.spans, 2, cut.channels)
        kernels.moments[grid](part, x, SPAN=cut.span, **cut.tiles())
        kernels.statistics[(mean.numel(),)](mean, rstd, part, EPS=eps, **cut.combining())
        kernels.apply[grid](y, x, mean, rstd, *weights, SILU=silu, GROUPS=groups, SPAN=cut.span, **cut.tiles())
    return y, mean, rstd


def _launch_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool
) -> Tensor:
    """dx in the order of x."""
    dx, nhwc = empty_like(x), is_nhwc(x)
    if not x.numel():
        return dx
    cut, grid = _tiling_of(x, groups)
    given = (dense(dy, nhwc), dense(x, nhwc), mean, rstd, weight.contiguous(), bias.contiguous())
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        if cut.whole:
            kernels.whole_backward[(mean.numel(),)](dx, *given, SILU=silu, GROUPS=groups, **cut.tiles())
            return dx
        constants = {"SILU": silu, "GROUPS": groups, "SPAN": cut.span, **cut.tiles()}
        part = mean.new_empty(len(x), cut.spans, 2, groups, cut.channels // groups)
        kernels.backward[grid](part, None, *given, **constants)
        kernels.backward[grid](dx, part.sum((1, 4)), *given, **constants)
    return dx


@torch.library.custom_op("dfkd::group_norm_silu", mutates_args=())
def _operator(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the order of x, mean and 1 / sqrt(var + eps) [B, G]."""
    if interpreted(x) or not x.numel():
        return _launch_forward(x, weight, bias, groups, eps, silu)
    values = _by_group(x, groups)
    variance, mean = torch.var_mean(values, 2, correction=0)
    rstd = (variance + eps).rsqrt()
    v = ((values - mean[..., None]) * rstd[..., None]).view(x.shape) * _by_channel(weight, x) + _by_channel(bias, x)
    return empty_like(x).copy_(F.silu(v) if silu else v), mean, rstd


@torch.library.custom_op("dfkd::group_norm_silu_backward", mutates_args=())
def _gradient(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool
) -> Tensor:
    """dx in the order of x."""
    if interpreted(x) or not x.numel():
        return _launch_backward(dy, x, mean, rstd, weight, bias, groups, silu)
    xh = (_by_group(x, groups) - mean[..., None]) * rstd[..., None]
    g = dy.to(mean.dtype) * _by_channel(weight, x)
    if silu:
        v = xh.view(x.shape) * _by_channel(weight, x) + _by_channel(bias, x)
        s = v.sigmoid()
        g = g * (s * (1 + v * (1 - s)))
    g = _by_group(g, groups)
    dx = (g - g.mean(2, keepdim=True) - xh * (g * xh).mean(2, keepdim=True)) * rstd[..., None]
    return empty_like(x).copy_(dx.view(x.shape))


_operator.register_kernel("cuda")(_launch_forward)
_gradient.register_kernel("cuda")(_launch_backward)


@_operator.register_fake
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=accumulated(x)) for _ in range(2))
    return empty_like(x), mean, rstd


@_gradient.register_fake
def _(dy: Tensor, x: Tensor, *arguments: object) -> Tensor:
    return empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, ctx.groups, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias)


def _backward(ctx: Any, dy: Tensor, *of_statistics: object) -> tuple[Tensor | None, ...]:
    return _gradient(dy, *ctx.saved_tensors, ctx.groups, ctx.silu), None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup)

# What stands in a traced graph
forward_operation = torch.ops.dfkd.group_norm_silu.default
backward_operation = torch.ops.dfkd.group_norm_silu_backward.default


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[B, G, values], float32 or float64."""
    return x.to(accumulated(x)).reshape(len(x), groups, x.shape[1:].numel() // groups)


def _by_channel(w: Tensor, x: Tensor) -> Tensor:
    """w [C], to be multiplied with maps like x, float32 or float64."""
    return w.to(accumulated(x)).view(-1, *(1 for _ in x.shape[2:]))


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, silu: bool = True
) -> Tensor:
    """y like x, differentiable once in x.

    Args:
        x: [B, C, ...], float64, float32, float16 or bfloat16; copied first where it is dense neither as it is written
            nor with the channels of a pixel side by side (NHWC).
        weight, bias: [C], floating. They are frozen: neither has a gradient.
        groups: G, a divisor of C.
        eps: added to the variance.
        silu: v sigmoid(v) of the result; otherwise it is normalised alone.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a weight that wants a gradient.
        RuntimeError: Triton is not installed.
    """
    require_triton()
    if x.dim() < 2 or x.dtype not in FLOATS:
        raise ValueError(f"x: {tuple(x.shape)} {x.dtype}; want [B, C, ...], floating")
    channels = x.shape[1]
    if groups < 1 or not channels or channels % groups:
        raise ValueError(f"{channels} channels in {groups} groups; want at least one, each of as many channels")
    if not eps > 0:
        raise ValueError(f"eps {eps}; want > 0")
    for name, tensor in (("weight", weight), ("bias", bias)):
        require(name, tensor, (channels,), FLOATS, x)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, and there is one in x alone; freeze it, or use F.group_norm")
    y: Tensor = _operator(x, weight, bias, groups, float(eps), silu)[0]
    return y
