"""A graph writes nothing in place, copies nothing in vain and computes nothing twice."""

from typing import Any

import torch
from torch import Tensor, fx

from dfkd_engine.errors import EngineError
from dfkd_engine.rewrites.constants import constant, identity
from dfkd_engine.rewrites.views import SAME, is_view

aten = torch.ops.aten

_NEUTRAL: dict[Any, int] = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1}


def without_writes(module: fx.GraphModule) -> None:
    """add_, relu_ and their like as add and relu. Raises EngineError where another tensor would see the write.

    Tracing lets every later use of the written tensor read the result, so only its views need a look.
    """
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        written = node.args[0]
        assert isinstance(written, fx.Node)
        views = [written, *(user for user in written.users if is_view(user))]
        later = [user for view in views for user in view.users if order[user] > order[node]]
        twin = _out_of_place(node.target)
        if twin is None or is_view(written) or later:
            why = "a graph writes nothing in place, and this tensor has other names that would change with it"
            raise EngineError(f"{describe(node)} writes into a tensor", why, "Use the operation without the underscore")
        node.target = twin


def without_copies(module: fx.GraphModule) -> None:
    """Drop operations whose result is their first argument: copies, casts to the same dtype, + 0, * 1, whole slices."""
    for node in list(module.graph.nodes):
        if node.op == "call_function" and _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def merge_equal(module: fx.GraphModule) -> None:
    """One node for equal operations on equal arguments, and one for each constant."""
    known: dict[Any, fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            key = identity(constant(module, node))
        elif node.op == "call_function":
            key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        else:
            continue
        first = known.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)


def describe(node: fx.Node) -> str:
    """The operation and the layer that it comes from."""
    return describe_operation(node.target, node.meta.get("custom", {}).get("module", ""))


def describe_operation(target: Any, path: str) -> str:
    return f"{target} of {path}" if path else f"{target} of the function itself, outside of any layer"


def _changes_nothing(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
        return False
    here, there = node.meta["val"], source.meta.get("val")
    if not isinstance(there, Tensor) or here.dtype != there.dtype or not _same_shape(here, there):
        return False
    if node.target in SAME or node.target in (aten._to_copy.default, aten.reshape.default, aten.expand.default):
        return bool(here.device == there.device)
    if node.target in (aten.slice.Tensor, aten.squeeze.dim, aten.squeeze.dims):
        return len(node.args) < 5 or bool(node.args[4] == 1)
    if node.target is aten.permute.default:
        return list(node.args[1]) == list(range(here.dim()))  # type: ignore[arg-type]
    if node.target is aten.constant_pad_nd.default:
        return not any(node.args[1])  # type: ignore[arg-type]
    neutral = _NEUTRAL.get(node.target)
    return neutral is not None and isinstance(node.args[1], (int, float)) and node.args[1] == neutral


def _same_shape(a: Tensor, b: Tensor) -> bool:
    # compared as text: asking whether symbolic sizes are equal would add a guard
    return [str(size) for size in a.shape] == [str(size) for size in b.shape]


def _frozen(value: Any) -> Any:
    """A hashable stand-in; 1, 1.0 and True differ."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in sorted(value.items()))
    return value if isinstance(value, fx.Node) else (type(value), repr(value))


def _out_of_place(target: Any) -> Any:
    """The operation that an in-place one does, as a new tensor: add.Tensor of add_.Tensor; None if there is none."""
    name = target._schema.name.removeprefix("aten::")
    twin = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(twin, target._overloadname, None)
