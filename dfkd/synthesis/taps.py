"""A teacher whose BatchNorm layers are one launch each with their moments (kernels/batch_norm_tap.py).

What `statistics.tapped` reads with hooks, after which every map is read again by the layer, by the ReLU behind it and
by the gradients of all three. A ReLU is taken into the launch only where it is proven to be all that reads the layer:
by torch.fx, which writes the network down as a graph of calls. Of a network that fx cannot follow, such as one that
decides its way by values, every layer stands alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd.synthesis.statistics import Moments, moments_of, once_each
from dfkd.teachers.classifier import is_frozen
from dfkd_kernels.batch_norm_tap import batch_norm_tap

_RELUS = (F.relu, torch.relu, torch.relu_)
_RELU_METHODS = ("relu", "relu_")


class Tap(nn.Module):
    """A layer, or a layer and the ReLU behind it, on [B, C, H, W]: what comes out, and the moments m1, m2 of its input.

    The layer's tensors are read where they are. One that computes something else than batch norm, as those of timm
    with an activation inside, runs as it is beside the moments by their definition.
    """

    def __init__(self, layer: nn.BatchNorm2d, relu: bool) -> None:
        super().__init__()
        self.layer, self.relu, self.native = layer, relu, is_plain(layer)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # its name in a BatchNorm's forward()
        layer = self.layer
        if not self.native:
            moments = moments_of(input, layer)
            return type(layer).forward(layer, input), moments.m1, moments.m2
        assert layer.running_mean is not None and layer.running_var is not None
        return batch_norm_tap(
            input, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps, self.relu
        )


def is_plain(layer: nn.Module) -> bool:
    """Whether its forward() is batch norm with running statistics in evaluation mode, and nothing beside."""
    return is_frozen(layer) or type(layer).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


@dataclass(frozen=True)
class Taps:
    """A teacher's network with taps.

    taps    one a layer, in the order of the layers
    graph   the network as a graph: images -> logits and the moments of the layers in turn; None where fx cannot follow
            it, and `network` runs with its layers replaced for the time of a pass
    why     why there is no graph, in words
    """

    network: nn.Module
    taps: tuple[Tap, ...]
    graph: fx.GraphModule | None
    why: str = ""

    @staticmethod
    def of(network: nn.Module, layers: tuple[nn.BatchNorm2d, ...]) -> "Taps":
        """Raises ValueError: a layer in training mode, or one that the graph does not use exactly once."""
        if training := [index for index, layer in enumerate(layers) if layer.training]:
            raise ValueError(f"BatchNorm layer {training[0]} is in training mode: call eval() on the teacher")
        if network._forward_hooks or network._forward_pre_hooks:
            return Taps(
                network, tuple(Tap(layer, False) for layer in layers), None, "it has hooks, which fx leaves out"
            )
        try:
            traced = fx.GraphModule(network, _Tracer(layers).trace(network))
        except Exception as error:  # of any kind: fx runs the network's own Python on what are no tensors
            why = (str(error).strip() or "no message").partition("\n")[0]
            return Taps(network, tuple(Tap(layer, False) for layer in layers), None, f"{type(error).__name__}: {why}")
        return Taps(network, _with_taps(traced, layers), traced)

    def __call__(self, images: Tensor) -> tuple[Tensor, list[Moments]]:
        """Normalised images -> logits [B, classes] and moments [B, C] of every layer, in the order of the layers."""
        if self.graph is not None:
            logits, moments = self.graph(images)
            return logits, [Moments(m1, m2) for m1, m2 in moments]
        with _patched(self.taps) as calls:
            logits = self.network(images)
        return logits, once_each(calls)

    def in_words(self) -> str:
        """How many layers are a launch of their own, and how many with a ReLU."""
        native, fused = (sum(getattr(tap, name) for tap in self.taps) for name in ("native", "relu"))
        found = f"{native} of {len(self.taps)} BatchNorm layers with their moments in a launch, {fused} with their ReLU"
        return found if self.graph is not None else f"{found} (fx cannot follow the teacher: {self.why})"


class _Tracer(fx.Tracer):
    """Takes the layers that are tapped for calls, also those of other libraries."""

    def __init__(self, layers: tuple[nn.BatchNorm2d, ...]) -> None:
        super().__init__()
        self.layers = set(map(id, layers))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self.layers or super().is_leaf_module(m, module_qualified_name)


def _with_taps(traced: fx.GraphModule, layers: tuple[nn.BatchNorm2d, ...]) -> tuple[Tap, ...]:
    """Put a tap in the place of every layer, and the moments beside the logits. Raises ValueError as `once_each`."""
    graph = traced.graph
    calls = {id(layer): list[fx.Node]() for layer in layers}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.get(id(traced.get_submodule(node.target)), []).append(node)
    taps, moments = [], []
    for index, node in enumerate(once_each([calls[id(layer)] for layer in layers])):
        readers = list(node.users)
        relu = readers[0] if is_plain(layers[index]) and len(readers) == 1 and _is_relu(readers[0], traced) else None
        taps.append(Tap(layers[index], relu is not None))
        traced.add_submodule(f"tap_{index}", taps[-1])
        with graph.inserting_before(node):
            tap = graph.call_module(f"tap_{index}", node.args, node.kwargs)
            y, m1, m2 = (graph.call_function(_item, (tap, place)) for place in range(3))
        moments.append((m1, m2))
        for replaced in (node,) if relu is None else (relu, node):
            replaced.replace_all_uses_with(y)
            graph.erase_node(replaced)
    (output,) = graph.find_nodes(op="output")
    output.args = ((output.args[0], moments),)
    graph.lint()
    traced.recompile()
    return tuple(taps)


def _item(found: tuple[Tensor, ...], place: int) -> Tensor:
    return found[place]


def _is_relu(node: fx.Node, traced: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return type(traced.get_submodule(str(node.target))) is nn.ReLU
    return node.target in _RELU_METHODS if node.op == "call_method" else node.target in _RELUS


@contextmanager
def _patched(taps: tuple[Tap, ...]) -> Iterator[list[list[Moments]]]:
    """The layers' forward() replaced for the time of a pass; the moments of every call, by layer."""
    calls: list[list[Moments]] = [[] for _ in taps]

    def replaced(tap: Tap, into: list[Moments]) -> None:
        def forward(input: Tensor) -> Tensor:
            y: Tensor
            y, m1, m2 = tap(input)
            into.append(Moments(m1, m2))
            return y

        tap.layer.forward = forward  # type: ignore[method-assign]

    try:
        for tap, into in zip(taps, calls, strict=True):
            replaced(tap, into)
        yield calls
    finally:
        for tap in taps:
            vars(tap.layer).pop("forward", None)
