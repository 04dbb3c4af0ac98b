"""Operations that only look at a tensor in another way, and sizes: numbers, the batch, and multiples of it."""

import operator
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


def plain_shapes(module: fx.GraphModule) -> None:
    """Every view and reshape as one reshape of its source, and every size as a number, the batch, or a multiple of it.

    A size of -1 would do for the batch, but torch.export takes minutes over hundreds of them.
    """
    sizes = _Sizes(module.graph)
    for node in list(module.graph.nodes):
        if isinstance(node.meta.get("val"), torch.SymInt) and node not in sizes.made:
            known = sizes.node(node.meta["val"])
            if known is not None:
                node.replace_all_uses_with(known)
    for node in module.graph.nodes:
        if node.target not in RESHAPES:
            continue
        source = node.args[0]
        while source.target in RESHAPES or source.target in SAME:
            source = source.args[0]
        wanted = [sizes.node(size) if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape]
        shape = node.args[1] if None in wanted else wanted
        node.target, node.args, node.kwargs = aten.reshape.default, (source, shape), {}


class _Sizes:
    """The batch and its multiples as nodes, one for each, read off the first input that has a batch."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.made: dict[fx.Node, None] = {}
        self._multiples: dict[int, fx.Node] = {}
        self._batch: Any = None
        inputs = graph.find_nodes(op="placeholder")
        for node in inputs:
            shape = node.meta["val"].shape
            if len(shape) and isinstance(shape[0], torch.SymInt):
                with graph.inserting_after(inputs[-1]):
                    self._add(1, graph.call_function(aten.sym_size.int, (node, 0)), shape[0])
                self._batch = shape[0].node.expr
                return

    def node(self, size: torch.SymInt) -> fx.Node | None:
        """None where the size is no multiple of the batch."""
        factor = None if self._batch is None else size.node.expr / self._batch
        if factor is None or not factor.is_Integer:
            return None
        if int(factor) not in self._multiples:
            with self.graph.inserting_after(self._multiples[1]):
                self._add(int(factor), self.graph.call_function(operator.mul, (self._multiples[1], int(factor))), size)
        return self._multiples[int(factor)]

    def _add(self, factor: int, node: fx.Node, size: torch.SymInt) -> None:
        node.meta["val"] = size
        self.made[node] = None
        self._multiples[factor] = node
