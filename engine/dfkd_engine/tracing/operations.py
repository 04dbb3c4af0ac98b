"""The plain operations that a graph may hold: what every backend, and ONNX, can be asked to run.

None draws random numbers, depends on values for its shape, writes in place, or is a backward operation.
"""

import operator
from typing import Any

import torch

aten = torch.ops.aten

_SHAPE = """
    reshape expand permute t transpose.int unsqueeze squeeze.dim squeeze.dims slice.Tensor select.int split.Tensor
    split_with_sizes unbind.int cat stack constant_pad_nd flip repeat index_select index.Tensor contiguous
    sym_size.int sym_numel
"""
_ELEMENTWISE = """
    add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar rsub.Tensor mul.Tensor mul.Scalar div.Tensor div.Scalar
    neg abs sign reciprocal sqrt rsqrt square exp expm1 log log1p sin cos tanh erf sigmoid pow.Tensor_Scalar
    pow.Scalar pow.Tensor_Tensor maximum minimum clamp clamp_min clamp_max clamp.Tensor where.self masked_fill.Scalar
    floor ceil round relu silu gelu elu leaky_relu hardswish hardsigmoid hardtanh softplus
    eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar ge.Tensor
    ge.Scalar logical_and logical_or logical_not logical_xor bitwise_and.Tensor bitwise_or.Tensor bitwise_not
    bitwise_xor.Tensor isinf isnan _to_copy full full_like scalar_tensor arange.start_step
"""
_REDUCTION = """
    sum.dim_IntList mean.dim amax amin argmax any.dim any all.dim all prod.dim_int var.correction cumsum
    _softmax _log_softmax
"""
_LAYER = """
    mm bmm addmm convolution native_group_norm native_layer_norm max_pool2d_with_indices max_pool2d avg_pool2d
    upsample_nearest2d embedding
"""

# On sizes, when they depend on the batch; getitem also takes one of an operation's several results.
_ON_SIZES = (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg)


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


ALLOWED = frozenset(map(_overload, " ".join((_SHAPE, _ELEMENTWISE, _REDUCTION, _LAYER)).split())) | set(_ON_SIZES)
