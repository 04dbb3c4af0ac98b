"""Eight bits in the place of a graph's wide factors: quantised and dequantised again, as ONNX and TensorRT take it.

    int8   q = clamp(round(x / s), -128, 127)      s = a / 127      symmetric: zero is exact, no zero point
    fp8    q = E4M3FN(clamp(x / s, -448, 448))     s = a / 448      4 bits of exponent, 3 of mantissa
    x ~ s q

a is the largest magnitude that the factor has: one number for a layer's input, one for every output channel of its
weights. Weights are kept in 8 bits. A compiler with 8-bit kernels takes both pairs into the product; any other machine
runs the graph as it stands, in wide arithmetic on the same quantised values: an exact simulation but for the order of
sums.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from dfkd_engine.errors import EngineError
from dfkd_engine.graph import Graph
from dfkd_engine.rewrites import constant, describe_operation
from dfkd_engine.rewrites.constants import drop_unused

aten = torch.ops.aten

NARROW = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_RANGE = {"int8": (-128.0, 127.0), "fp8": (-448.0, 448.0)}


@dataclass(frozen=True)
class Amax:
    """Largest magnitudes of a layer's factors. input: a number. weight: [output channels]."""

    input: float
    weight: Tensor


@torch.library.custom_op("dfkd::quantise", mutates_args=())
def quantise(x: Tensor, scale: Tensor, narrow: str) -> Tensor:
    """x in units of `scale`, which broadcasts to it: clamped to NARROW[narrow]'s range, rounded to nearest even."""
    units = x / scale
    return (units.round() if narrow == "int8" else units).clamp(*_RANGE[narrow]).to(NARROW[narrow])


@quantise.register_fake
def _(x: Tensor, scale: Tensor, narrow: str) -> Tensor:
    return torch.empty_like(x, dtype=NARROW[narrow])


@torch.library.custom_op("dfkd::dequantise", mutates_args=())
def dequantise(q: Tensor, scale: Tensor, axis: int) -> Tensor:
    """q times `scale`, in the scale's dtype. scale: [] for all of q, or one number for each entry along `axis`."""
    shape = [-1 if dim == axis else 1 for dim in range(q.dim())] if scale.dim() else []
    return q.to(scale.dtype) * scale.reshape(shape)


@dequantise.register_fake
def _(q: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)


QUANTISE, DEQUANTISE = torch.ops.dfkd.quantise.default, torch.ops.dfkd.dequantise.default


def quantised(graph: Graph, layers: Mapping[str, Amax], narrow: str) -> Graph:
    """The graph with input and weights of these layers in 8 bits, everything else as it was.

    layers: by the path that node.meta["module"] has. narrow: a key of NARROW.

    Raises EngineError: a layer that the graph does not hold, or whose weights it does not hold as they are (a
    transposed convolution, or a product of two results); a magnitude that is not finite.
    """
    module = _copy(graph.module)
    pairs: dict[Any, fx.Node] = {}  # one pair for the layers that share an input
    found = set()
    for node in list(module.graph.nodes):
        place = _FACTORS.get(node.target)
        amax = layers.get(node.meta.get("module", ""))
        if place is None or amax is None:
            continue
        found.add(node.meta["module"])
        _check(node, amax)
        source, weight, axis = node.args[place], *_weight(module, node, place + 1)
        scale = _scale(torch.tensor(amax.input), narrow, weight.dtype).to(weight.device)
        key = source, scale.item()
        if key not in pairs:
            pairs[key] = _pair(module, node, source, scale, narrow)
        stored = _stored(module, node, weight, amax.weight, axis, narrow)
        arguments = list(node.args)
        arguments[place : place + 2] = pairs[key], stored
        node.args = tuple(arguments)
    if absent := sorted(layers.keys() - found):
        why = f"the graph has no product of that name ({len(absent)} of {len(layers)} are missing)"
        raise EngineError(f"{absent[0]} cannot be quantised", why, _RECALIBRATE)
    module.graph.eliminate_dead_code()
    drop_unused(module)
    module.graph.lint()
    module.recompile()
    return replace(graph, module=module)


def is_quantised(graph: Graph) -> bool:
    return any(node.target is DEQUANTISE for node in graph.module.graph.nodes)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """QuantizeLinear and DequantizeLinear of opset 19 for torch.onnx.export(custom_translation_table=...)."""
    import onnx
    from onnxscript import opset19

    op: Any = opset19  # its stubs know the values of a running program only
    # A zero point says of what type the result is.
    zeros = {
        "int8": onnx.helper.make_tensor("zero", onnx.TensorProto.INT8, [], [0]),
        "fp8": onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT8E4M3FN, [], [0.0]),
    }

    def to_onnx(x: Any, scale: Any, narrow: str) -> Any:
        return op.QuantizeLinear(x, scale, op.Constant(value=zeros[narrow]))

    def from_onnx(q: Any, scale: Any, axis: int) -> Any:
        return op.DequantizeLinear(q, scale, axis=axis)

    return {QUANTISE: to_onnx, DEQUANTISE: from_onnx}


_RECALIBRATE = "Calibrate the network that the graph was traced from"

# Where the input of a product stands among its arguments; the weights follow it.
_FACTORS = {aten.convolution.default: 0, aten.mm.default: 0, aten.addmm.default: 1}


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    """A module with a graph of its own; constants are shared, and nothing writes them."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph, class_name="Graph")


def _check(node: fx.Node, amax: Amax) -> None:
    if not (torch.isfinite(amax.weight).all() and 0 <= amax.input < float("inf")):
        why = "the magnitudes of its input or weights are not finite"
        raise EngineError(_what(node), why, "Calibrate with a network and inputs that are")


def _weight(module: fx.GraphModule, node: fx.Node, place: int) -> tuple[Tensor, int]:
    """The weights as the product takes them, and the axis of its output channels."""
    source = node.args[place]
    assert isinstance(source, fx.Node)
    turned = source.target is aten.t.default
    origin = source.args[0] if turned else source
    transposed = node.target is aten.convolution.default and node.args[6]
    if not isinstance(origin, fx.Node) or origin.op != "get_attr" or transposed:
        why = "its second factor is no constant with the output channels along one axis"
        raise EngineError(_what(node), why, "Leave the layer out")
    value = constant(module, origin)
    if node.target is aten.convolution.default:
        return value, 0
    # turned here and now: compilers look for the dequantised constant right at the product
    return (value.t() if turned else value), 1


def _pair(module: fx.GraphModule, node: fx.Node, source: Any, scale: Tensor, narrow: str) -> fx.Node:
    graph = module.graph
    with graph.inserting_before(node):
        unit = graph.get_attr(_register(module, f"{_stem(node)}_input_scale", scale))
        small = graph.call_function(QUANTISE, (source, unit, narrow))
        wide = graph.call_function(DEQUANTISE, (small, unit, 0))
    for new in (unit, small, wide):
        new.meta = dict(node.meta)
    return wide


def _stored(module: fx.GraphModule, node: fx.Node, weight: Tensor, amax: Tensor, axis: int, narrow: str) -> fx.Node:
    if amax.shape != (weight.shape[axis],):
        why = f"it has {weight.shape[axis]} output channels, and magnitudes of shape {list(amax.shape)} are given"
        raise EngineError(_what(node), why, _RECALIBRATE)
    scales = _scale(amax, narrow, weight.dtype).to(weight.device)
    shape = [-1 if dim == axis else 1 for dim in range(weight.dim())]
    values = quantise(weight.contiguous(), scales.reshape(shape), narrow)
    graph = module.graph
    with graph.inserting_before(node):
        small = graph.get_attr(_register(module, f"{_stem(node)}_weight_{narrow}", values))
        unit = graph.get_attr(_register(module, f"{_stem(node)}_weight_scale", scales))
        wide = graph.call_function(DEQUANTISE, (small, unit, axis))
    for new in (small, unit, wide):
        new.meta = dict(node.meta)
    return wide


def _scale(amax: Tensor, narrow: str, dtype: torch.dtype) -> Tensor:
    """Never 0, and no subnormal of half precision, which would have few bits left."""
    scale: Tensor = (amax.double() / _RANGE[narrow][1]).clamp(min=torch.finfo(dtype).tiny).to(dtype)
    return scale


def _register(module: fx.GraphModule, name: str, value: Tensor) -> str:
    free, number = name, 1
    while hasattr(module, free):
        number += 1
        free = f"{name}_{number}"
    module.register_buffer(free, value)
    return free


def _stem(node: fx.Node) -> str:
    return str(node.meta["module"]).replace(".", "_")


def _what(node: fx.Node) -> str:
    return f"{describe_operation(node.target, node.meta['module'])} cannot be quantised"
