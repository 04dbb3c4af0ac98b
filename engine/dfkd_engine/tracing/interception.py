"""Functions replaced while a graph is traced, before autograd sees them, so that their gradients are plain too."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from dfkd_engine.decompositions.layers import weight_gradient
from dfkd_engine.decompositions.resize import interpolate
from dfkd_engine.errors import EngineError


class Interception(TorchFunctionMode):
    """Attention as matmul, softmax, matmul; resizing as matrices; pooling to one pixel as a mean."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if func is F.interpolate:
            bound = inspect.signature(F.interpolate).bind(*args, **kwargs).arguments
            x = bound.pop("input")
            return interpolate(x, **bound) if x.dim() == 4 else func(*args, **kwargs)
        if func is F.adaptive_avg_pool2d and set(_pair(kwargs.get("output_size", args[-1]))) == {1}:
            x = args[0] if args else kwargs["input"]
            return x.mean((-2, -1), keepdim=True)  # PyTorch's own then writes into the result in place
        if func is torch.autograd.grad:
            _check_gradient(args, kwargs)
        if func in (torch.autograd.backward, Tensor.backward):
            why = "it adds to the gradients of weights, which are frozen in a graph"
            todo = "Call torch.autograd.grad on a detached copy of the input"
            raise EngineError("backward() is called", why, todo)
        return func(*args, **kwargs)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query key^T scale + mask) value, of [..., L, D], [..., S, D], [..., S, E] -> [..., L, E].

    attn_mask: broadcastable to [..., L, S]; added, or, if boolean, of the places to attend to.
    """
    if dropout_p:
        raise EngineError("attention has dropout", "a graph has no random operation", "Call eval() on the networks")
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    # the scale first: in half precision the product would overflow without it
    logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    return torch.softmax(logits, -1) @ value


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _check_gradient(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    grad: Callable[..., Any] = torch.autograd.grad
    inputs = inspect.signature(grad).bind(*args, **kwargs).arguments["inputs"]
    for tensor in [inputs] if isinstance(inputs, Tensor) else inputs:
        # all that depends on an argument of the traced function is a FakeTensor; the rest are the networks' weights
        if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor):
            raise weight_gradient(f"a weight {list(tensor.shape)}")
