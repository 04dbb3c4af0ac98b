"""Constants of a graph: worked out in advance, and named after the parameters that they are."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from dfkd_engine.rewrites.views import VIEWS

aten = torch.ops.aten


def fold_constants(module: fx.GraphModule) -> None:
    """Work out what depends on constants alone; views of a constant stay views."""
    fixed: set[fx.Node] = set()
    plain: set[fx.Node] = set()  # constants, and views of constants
    for node in module.graph.nodes:
        if node.op == "get_attr":
            plain.add(node)
            fixed.add(node)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if all(argument in fixed for argument in node.all_input_nodes):
                fixed.add(node)
                if node.target in VIEWS and node.args[0] in plain and not _copies(node):
                    plain.add(node)
        elif node.target is operator.getitem and node.args[0] in fixed:
            fixed.add(node)
    values: dict[fx.Node, Any] = {}
    for node in list(module.graph.nodes):
        needed = any(user not in fixed for user in node.users)
        if node not in fixed or node in plain or not needed or not isinstance(node.meta.get("val"), Tensor):
            continue
        value = _value(module, node, values)
        with module.graph.inserting_before(node):
            name = _add_constant(module, f"{_source_name(node)}_folded", value)
            new = module.graph.get_attr(name)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
    module.graph.eliminate_dead_code()


def name_constants(module: fx.GraphModule, networks: Mapping[str, nn.Module]) -> None:
    """Give constants the names of the parameters and buffers that they are, dots as underscores."""
    names: dict[Any, str] = {}
    for path, network in networks.items():
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            names.setdefault(identity(tensor), f"{path}.{name}".replace(".", "_"))
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = constant(module, node)
            name = names.get(identity(value), "constant" if str(node.target).startswith("_") else str(node.target))
            node.target = _add_constant(module, name, value.detach())
    drop_unused(module)
    module.recompile()


def constant(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor of a get_attr node."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory read in the same way."""
    if not tensor.numel():
        return ("empty", tensor.dtype, tuple(tensor.shape), str(tensor.device))
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device))


def _value(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What a node of constants computes, without recursion into long chains."""
    waiting = [node]
    while waiting:
        top = waiting[-1]
        missing = [argument for argument in top.all_input_nodes if argument not in values]
        if missing:
            waiting += missing
            continue
        waiting.pop()
        if top in values:
            continue
        if top.op == "get_attr":
            values[top] = constant(module, top).detach()
        else:
            assert callable(top.target)
            args, kwargs = fx.map_arg((top.args, top.kwargs), lambda n: values[n])
            with torch.no_grad():
                values[top] = top.target(*args, **kwargs)
    return values[node]


def _source_name(node: fx.Node) -> str:
    """The name of the first constant that a node is made of."""
    while node.op != "get_attr":
        if not node.all_input_nodes:
            return "constant"
        node = node.all_input_nodes[0]
    return str(node.target)


def _add_constant(module: fx.GraphModule, name: str, value: Tensor) -> str:
    """Register a buffer under the name, numbered where it is taken by another tensor; returns the name."""
    free, number = name, 1
    while hasattr(module, free) and getattr(module, free) is not value:
        number += 1
        free = f"{name}_{number}"
    if not hasattr(module, free):
        module.register_buffer(free, value)
    return free


def drop_unused(module: fx.GraphModule) -> None:
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for table in (module._buffers, module._parameters, module.__dict__):
        for name in [n for n, v in table.items() if isinstance(v, Tensor) and n not in used]:
            del table[name]


def _copies(node: fx.Node) -> bool:
    """True if a view of a constant has to copy: a reshape of what lies in another order."""
    return node.target is aten.reshape.default and not node.args[0].meta["val"].is_contiguous()  # type: ignore[union-attr]
