"""Layers with weights: normalisation in float32 whatever the network's dtype, and gradients in a layer's input.

Networks in a graph are frozen: a gradient of their weights is refused. The gradient of a convolution in its input is a
convolution. Batch norm becomes an affine map with constant factors. Group and layer norm stay whole in the forward
direction, where every backend has its own kernel; the gradient uses the mean and the reciprocal deviation that they
return.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dfkd_engine.errors import EngineError

aten = torch.ops.aten
Maybe: TypeAlias = Tensor | None
Ints: TypeAlias = Sequence[int]
Mask: TypeAlias = Sequence[bool]
_HALF = (torch.float16, torch.bfloat16)


def weight_gradient(what: str) -> EngineError:
    """The error of a function that asks for a gradient of weights."""
    why = "weights are frozen in a graph; only gradients of activations can be taken"
    return EngineError(f"a gradient of {what} is asked for", why, "set requires_grad_(False) on the networks")


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Ints | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
    mask: Mask,
) -> tuple[Maybe, None, None]:
    """Gradient in x [B, C, ...] from grad [B, K, ...].

    weight: [K, C / groups, ...], or [C, K / groups, ...] if transposed.
    """
    _require_frozen("convolution", mask)
    if not mask[0]:
        return None, None, None
    n = weight.dim() - 2
    stride, padding, dilation = (list(v) * (n if len(v) == 1 else 1) for v in (stride, padding, dilation))
    if transposed:
        return _convolve(grad, weight, stride, padding, dilation, groups), None, None
    kernel = weight.shape[2:]
    flipped_padding = [dilation[i] * (kernel[i] - 1) - padding[i] for i in range(n)]
    if all(s == 1 for s in stride) and min(flipped_padding) >= 0:
        # twice as fast as a transposed convolution in ONNX Runtime
        return _convolve(grad, _flipped(weight, groups), stride, flipped_padding, dilation, groups), None, None
    # rows behind the last window that fits: they have no gradient, but they have a size
    left = [x.shape[2 + i] - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i]) for i in range(n)]
    left = [left[i] - dilation[i] * (kernel[i] - 1) - 1 for i in range(n)]
    if grad.dtype == torch.bfloat16:  # TensorRT has no transposed convolution of it; only a few strided layers pay
        grad, weight = grad.float(), weight.float()
    result = aten.convolution.default(grad, weight, None, stride, padding, dilation, True, left, groups)
    return result.to(x.dtype), None, None


def _convolve(x: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Tensor:
    none = [0] * len(stride)
    result: Tensor = aten.convolution.default(x, weight, None, stride, padding, dilation, False, none, groups)
    return result


def _flipped(weight: Tensor, groups: int) -> Tensor:
    """[K, C / groups, ...] -> [C, K / groups, ...], in the memory format of weight."""
    outputs, inputs, *kernel = weight.shape
    parts = weight.reshape(groups, outputs // groups, inputs, *kernel).transpose(1, 2)
    turned = parts.reshape(groups * inputs, outputs // groups, *kernel).flip(*range(2, weight.dim()))
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        return turned.contiguous(memory_format=torch.channels_last)
    return turned.contiguous()


def batch_norm_inference(
    x: Tensor, weight: Maybe, bias: Maybe, mean: Tensor, variance: Tensor, momentum: float, eps: float
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
    x: Tensor, weight: Maybe, bias: Maybe, mean: Maybe, variance: Maybe, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance = _running(mean, variance, training)
    return batch_norm_inference(x, weight, bias, mean, variance, momentum, eps)


def cudnn_batch_norm(
    x: Tensor, weight: Tensor, bias: Maybe, mean: Maybe, variance: Maybe, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, first, second = native_batch_norm(x, weight, bias, mean, variance, training, momentum, eps)
    return out, first, second, x.new_empty(0, dtype=torch.uint8)


def native_batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Maybe,
    mean: Maybe,
    variance: Maybe,
    save_mean: Maybe,
    save_invstd: Maybe,
    training: bool,
    eps: float,
    mask: Mask,
) -> tuple[Tensor, None, None]:
    _require_frozen("batch norm", mask)
    _, variance = _running(mean, variance, training)
    return (grad.float() * _channelwise(_scale(weight, variance, eps), x)).to(x.dtype), None, None


def native_group_norm(x: Tensor, weight: Maybe, bias: Maybe, n: int, c: int, hxw: int, groups: int, eps: float) -> Any:
    if x.dtype not in _HALF:
        return NotImplemented
    out, mean, rstd = aten.native_group_norm.default(x.float(), _up(weight), _up(bias), n, c, hxw, groups, eps)
    return out.to(x.dtype), mean, rstd


def native_group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Maybe,
    n: int,
    c: int,
    hxw: int,
    groups: int,
    mask: Mask,
) -> tuple[Tensor, None, None]:
    """dx = rstd (w g - mean(w g) - xh mean(w g xh)), means over a group, as sums over pixels and then over channels.

    So the feature map is never reshaped into groups, which would copy one that lies in NHWC order.
    """
    _require_frozen("group norm", mask)
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


def native_layer_norm(x: Tensor, shape: Ints, weight: Maybe, bias: Maybe, eps: float) -> Any:
    if x.dtype not in _HALF:
        return NotImplemented
    out, mean, rstd = aten.native_layer_norm.default(x.float(), shape, _up(weight), _up(bias), eps)
    return out.to(x.dtype), mean, rstd


def native_layer_norm_backward(
    grad: Tensor, x: Tensor, shape: Ints, mean: Tensor, rstd: Tensor, weight: Maybe, bias: Maybe, mask: Mask
) -> tuple[Tensor, None, None]:
    _require_frozen("layer norm", mask)
    axes = tuple(range(x.dim() - len(shape), x.dim()))
    g = grad.float() if weight is None else grad.float() * weight.float()
    normed = (x.float() - mean) * rstd
    inner = g - g.mean(axes, True) - normed * (g * normed).mean(axes, True)
    return (inner * rstd).to(x.dtype), None, None


def _scale(weight: Maybe, variance: Tensor, eps: float) -> Tensor:
    scale = torch.rsqrt(variance.float() + eps)
    return scale if weight is None else scale * weight.float()


def _channelwise(v: Tensor, x: Tensor) -> Tensor:
    """[C] -> [C, 1, ...], which broadcasts over x [B, C, ...]."""
    return v.reshape(-1, *(1 for _ in range(x.dim() - 2)))


def _up(v: Maybe) -> Maybe:
    return None if v is None else v.float()


def _running(mean: Maybe, variance: Maybe, training: bool) -> tuple[Tensor, Tensor]:
    if training or mean is None or variance is None:
        why = "its output for one image depends on the other images of the batch"
        raise EngineError("a batch norm uses the statistics of its batch", why, "Call eval() on the networks")
    return mean, variance


def _require_frozen(layer: str, mask: Mask) -> None:
    """mask: which gradients are wanted; all but the first are those of weights."""
    if any(mask[1:]):
        raise weight_gradient(f"the weights of a {layer}")


TABLE: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: convolution_backward,
    aten._native_batch_norm_legit_no_training.default: batch_norm_inference,
    aten.native_batch_norm.default: native_batch_norm,
    aten.cudnn_batch_norm.default: cudnn_batch_norm,
    aten.native_batch_norm_backward.default: native_batch_norm_backward,
    aten.native_group_norm.default: native_group_norm,
    aten.native_group_norm_backward.default: native_group_norm_backward,
    aten.native_layer_norm.default: native_layer_norm,
    aten.native_layer_norm_backward.default: native_layer_norm_backward,
}
