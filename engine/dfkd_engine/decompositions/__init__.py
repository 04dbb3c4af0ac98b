"""What operations become in a graph: the table that tracing consults, operation -> function of plain operations.

Everything is written for frozen networks: only gradients of activations exist. A function may return NotImplemented,
and the operation stays as it is. Signatures are those of the operations in ATen's native_functions.yaml.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._decomp import core_aten_decompositions

from dfkd_engine.decompositions import activations, layers, pooling

aten = torch.ops.aten

# Plain operations that PyTorch's table would take apart: every backend has them whole, and eager runs them faster so.
_KEPT = {
    aten.silu.default,
    aten.softplus.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.masked_fill.Scalar,
    aten.upsample_nearest2d.default,
    aten.square.default,
    aten.rsub.Scalar,
    aten.t.default,
    aten.transpose.int,
    aten.stack.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
}


@cache
def table() -> dict[Any, Callable[..., Any]]:
    """PyTorch's core decompositions, without what stays whole and with this package's in front."""
    core = {op: function for op, function in dict(core_aten_decompositions()).items() if not _stays(op)}
    parts = (activations, layers, pooling)
    return core | {op: function for part in parts for op, function in part.TABLE.items()}


def _stays(op: Any) -> bool:
    # the rewrites replace operations in place; taken apart here they would end in copy_
    return op in _KEPT or op._schema.is_mutable
