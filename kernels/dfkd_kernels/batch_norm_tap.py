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

from dfkd_kernels.batch_norm_launches import accumulated, launch, launch_gradient, results_of
from dfkd_kernels.guided_clean import interpreted
from dfkd_kernels.rows import flat

try:
    import triton
except ModuleNotFoundError:  # a CPU-only installation needs the reference alone
    triton = None

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


def _of_channels(v: Tensor, x: Tensor) -> Tensor:
    return v.to(accumulated(x))[None, :, None, None]


def _centred(x: Tensor, running_mean: Tensor) -> Tensor:
    return x.to(accumulated(x)) - _of_channels(running_mean, x)


def _scale(x: Tensor, running_var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    scale = 1 / (_of_channels(running_var, x) + eps).sqrt()
    return scale if weight is None else scale * _of_channels(weight, x)


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
        return launch(x, running_mean, running_var, weight, bias, eps, relu)
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
        return launch_gradient(*given)
    return torch.empty_like(x).copy_(batch_norm_tap_gradient_ref(*given))


_operator.register_kernel("cuda")(launch)
_gradient_operator.register_kernel("cuda")(launch_gradient)


@_operator.register_fake
def _fake(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    return results_of(x)


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
