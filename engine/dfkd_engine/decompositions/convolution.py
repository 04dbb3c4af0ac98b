"""The gradient of a convolution in its input is a convolution."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dfkd_engine.decompositions.frozen import refuse_weight_gradients

aten = torch.ops.aten


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, None, None]:
    """Of x [B, C, ...] and grad [B, K, ...]; weight [K, C / groups, ...], or [C, K / groups, ...] if transposed."""
    refuse_weight_gradients("convolution", mask)
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


def _convolve(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
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


TABLE: dict[Any, Callable[..., Any]] = {aten.convolution_backward.default: convolution_backward}
