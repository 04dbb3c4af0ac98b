"""Group normalisation with the activation behind it, and the gradient in its input, for frozen weights.

    xh = (x - mean) / sqrt(var + eps)                     per image and group, biased variance; arXiv:1803.08494
    y  = act(v), v = w xh + b                             act(v) = v sigmoid(v), or v
    g  = dy act'(v) w,  act'(v) = s (1 + v (1 - s)),      s = sigmoid(v)
    dx = (g - <g> - xh <g xh>) / sqrt(var + eps)          <.>: the mean over an image's group

x, y, dy, dx [B, C, ...]; w, b [C]; mean and 1 / sqrt(var + eps) [B, G] are all that is kept beside x. Computed in
float32, or float64 where x is. The variance is never a difference of squares, which a large mean would cancel.

What must move is x once and y once, in the gradient dy, x and dx. A group that fits a program (`tiling` in
kernels/group_norm_tiles.py) moves no more; a larger one is read twice, and what the first reading left in the cache
is read first. Feature maps lie in either memory order, NCHW or NHWC, and results in that of x.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_kernels.group_norm_backward import launch_backward
from dfkd_kernels.group_norm_forward import launch_forward
from dfkd_kernels.group_norm_tiles import accumulated, like
from dfkd_kernels.guided_clean import interpreted

try:
    import triton
except ModuleNotFoundError:  # a CPU-only installation needs the reference alone
    triton = None

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def group_norm_silu_ref(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, silu: bool = True
) -> Tensor:
    """As `group_norm_silu`, in PyTorch, by autograd differentiable as often as wanted."""
    wide = accumulated(x)
    v = torch.group_norm(x.to(wide), groups, weight.to(wide), bias.to(wide), eps)
    return (F.silu(v) if silu else v).to(x.dtype)


@torch.library.custom_op("dfkd::group_norm_silu", mutates_args=())
def _operator(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the order of x, mean and 1 / sqrt(var + eps) [B, G]."""
    if interpreted(x):
        return launch_forward(x, weight, bias, groups, eps, silu)
    y, mean, rstd = _fake(x, weight, bias, groups, eps, silu)
    values = x.to(mean.dtype).reshape(len(x), groups, -1)
    torch.mean(values, 2, out=mean)
    centred = values - mean[:, :, None]
    torch.rsqrt(centred.square().mean(2) + eps, out=rstd)
    v = _affine((centred * rstd[:, :, None]).view(x.shape), weight, bias)
    return y.copy_(F.silu(v) if silu else v), mean, rstd


@torch.library.custom_op("dfkd::group_norm_silu_backward", mutates_args=())
def _gradient(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool
) -> Tensor:
    """dx in the order of x."""
    if interpreted(x):
        return launch_backward(dy, x, mean, rstd, weight, bias, groups, silu)
    xh = ((x.to(mean.dtype).reshape(len(x), groups, -1) - mean[:, :, None]) * rstd[:, :, None]).view(x.shape)
    g = dy.to(mean.dtype)
    if silu:
        v = _affine(xh, weight, bias)
        s = v.sigmoid()
        g = g * (s * (1 + v * (1 - s)))
    g = (g * _by_channel(weight, g)).reshape(len(x), groups, -1)
    xh = xh.reshape(g.shape)
    dx = (g - g.mean(2, keepdim=True) - xh * (g * xh).mean(2, keepdim=True)) * rstd[:, :, None]
    return like(x).copy_(dx.view(x.shape))


_operator.register_kernel("cuda")(launch_forward)
_gradient.register_kernel("cuda")(launch_backward)


@_operator.register_fake
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=accumulated(x)) for _ in range(2))
    return like(x), mean, rstd


@_gradient.register_fake
def _(dy: Tensor, x: Tensor, *arguments: object) -> Tensor:
    return like(x)


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


def _affine(xh: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addcmul(_by_channel(bias, xh), xh, _by_channel(weight, xh))


def _by_channel(w: Tensor, x: Tensor) -> Tensor:
    return w.to(x.dtype).view(-1, *(1 for _ in x.shape[2:]))


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
    if triton is None:
        raise RuntimeError("Triton is not installed, and kernels=triton needs it. pip install triton")
    if x.dim() < 2 or x.dtype not in FLOATS:
        raise ValueError(f"x: {tuple(x.shape)} {x.dtype}; want [B, C, ...], floating")
    channels = x.shape[1]
    if groups < 1 or not channels or channels % groups:
        raise ValueError(f"{channels} channels in {groups} groups; want at least one, each of as many channels")
    if not eps > 0:
        raise ValueError(f"eps {eps}; want > 0")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != (channels,) or tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype}; want ({channels},), floating")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, and there is one in x alone; freeze it, or use F.group_norm")
    y: Tensor = _operator(x, weight, bias, groups, float(eps), silu)[0]
    return y
