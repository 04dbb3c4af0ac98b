"""Normalisation layers: their arithmetic in float32 whatever the network's dtype, and their gradients.

Batch norm becomes an affine map with constant factors. Group and layer norm stay whole in the forward direction, where
every backend has its own kernel; the gradient uses the mean and the reciprocal deviation that they return.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dfkd_engine.decompositions.frozen import refuse_weight_gradients
from dfkd_engine.errors import EngineError

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


def batch_norm_inference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, C, ...]; the saved statistics of training are empty."""
    scale = _scale(weight, variance, eps)
    shift = -mean.float() * scale
    if bias is not None:
        shift = shift + bias.float()
    out = x.float() * _channelwise(scale, x) + _channelwise(shift, x)
    empty = x.new_empty(0)
    return out.to(x.dtype), empty, empty


def native_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance = _running(mean, variance, training)
    return batch_norm_inference(x, weight, bias, mean, variance, momentum, eps)


def cudnn_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, first, second = native_batch_norm(x, weight, bias, mean, variance, training, momentum, eps)
    return out, first, second, x.new_empty(0, dtype=torch.uint8)


def native_batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    save_mean: Tensor | None,
    save_invstd: Tensor | None,
    training: bool,
    eps: float,
    mask: Sequence[bool],
) -> tuple[Tensor, None, None]:
    refuse_weight_gradients("batch norm", mask)
    _, variance = _running(mean, variance, training)
    return (grad.float() * _channelwise(_scale(weight, variance, eps), x)).to(x.dtype), None, None


def native_group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, hxw: int, groups: int, eps: float
) -> Any:
    if x.dtype not in _HALF:
        return NotImplemented
    out, mean, rstd = aten.native_group_norm.default(x.float(), _up(weight), _up(bias), n, c, hxw, groups, eps)
    return out.to(x.dtype), mean, rstd


def native_group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    n: int,
    c: int,
    hxw: int,
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor, None, None]:
    """dx = rstd (w g - mean(w g) - xh mean(w g xh)), means over a group, as sums over pixels and then over channels.

    So the feature map is never reshaped into groups, which would copy one that lies in NHWC order.
    """
    refuse_weight_gradients("group norm", mask)
    pixels = tuple(range(2, x.dim()))
    width = c // groups

    def over_channels(v: Tensor) -> Tensor:  # [B, groups] -> [B, C, 1, ...]
        spread = v[:, :, None].expand(-1, groups, width).reshape(-1, c)
        return spread.reshape(-1, c, *(1 for _ in pixels))

    def over_groups(v: Tensor) -> Tensor:  # [B, C] -> the mean of v w over group and pixels [B, groups]
        v = v if weight is None else v * weight.float()
        return v.reshape(-1, groups, width).sum(2) / (width * hxw)

    grad, centred = grad.float(), x.float() - over_channels(mean)
    if pixels:
        along, plain = (grad * centred).sum(pixels), grad.sum(pixels)
    else:
        along, plain = grad * centred, grad
    slope = over_channels(-over_groups(along) * rstd * rstd * rstd)
    shift = over_channels(-over_groups(plain) * rstd)
    scale = over_channels(rstd)
    if weight is not None:
        scale = scale * _channelwise(weight.float(), x)
    return (grad * scale + (centred * slope + shift)).to(x.dtype), None, None


def native_layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    if x.dtype not in _HALF:
        return NotImplemented
    out, mean, rstd = aten.native_layer_norm.default(x.float(), shape, _up(weight), _up(bias), eps)
    return out.to(x.dtype), mean, rstd


def native_layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Sequence[bool],
) -> tuple[Tensor, None, None]:
    refuse_weight_gradients("layer norm", mask)
    axes = tuple(range(x.dim() - len(shape), x.dim()))
    g = grad.float() if weight is None else grad.float() * weight.float()
    normed = (x.float() - mean) * rstd
    inner = g - g.mean(axes, True) - normed * (g * normed).mean(axes, True)
    return (inner * rstd).to(x.dtype), None, None


def _scale(weight: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    scale = torch.rsqrt(variance.float() + eps)
    return scale if weight is None else scale * weight.float()


def _channelwise(v: Tensor, x: Tensor) -> Tensor:
    """[C] -> [C, 1, ...], which broadcasts over x [B, C, ...]."""
    return v.reshape(-1, *(1 for _ in range(x.dim() - 2)))


def _up(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.float()


def _running(mean: Tensor | None, variance: Tensor | None, training: bool) -> tuple[Tensor, Tensor]:
    if training or mean is None or variance is None:
        why = "its output for one image depends on the other images of the batch"
        raise EngineError("a batch norm uses the statistics of its batch", why, "Call eval() on the networks")
    return mean, variance


TABLE: dict[Any, Callable[..., Any]] = {
    aten._native_batch_norm_legit_no_training.default: batch_norm_inference,
    aten.native_batch_norm.default: native_batch_norm,
    aten.cudnn_batch_norm.default: cudnn_batch_norm,
    aten.native_batch_norm_backward.default: native_batch_norm_backward,
    aten.native_group_norm.default: native_group_norm,
    aten.native_group_norm_backward.default: native_group_norm_backward,
    aten.native_layer_norm.default: native_layer_norm,
    aten.native_layer_norm_backward.default: native_layer_norm_backward,
}
