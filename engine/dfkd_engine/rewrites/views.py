"""Which operations only look at a tensor in another way, or copy it."""

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# A copy, a new name or another order in memory is no operation in a graph that writes nothing in place.
SAME: frozenset[Any] = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.clone.default,
        aten.lift_fresh.default,
        aten.lift_fresh_copy.default,
        aten.contiguous.default,
    }
)
RESHAPES: frozenset[Any] = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_copy.default}
)
# Views cost nothing, and as constants they would be second copies of a weight on disk.
VIEWS: frozenset[Any] = frozenset(
    {
        aten.permute.default,
        aten.t.default,
        aten.transpose.int,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.slice.Tensor,
        aten.select.int,
        aten.reshape.default,
    }
)


def is_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (target.is_view or target in VIEWS or target in RESHAPES)
