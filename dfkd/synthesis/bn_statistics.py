"""Statistics of what enters a teacher's BatchNorm layers, per image and over a group.

Kept are the first two moments of a layer's input x about its running mean r,

    m1 = mean_hw(x - r)        m2 = mean_hw((x - r)^2)        so   mean - r = M1,  var = M2 - M1^2 (biased)

with M1, M2 either an image's own moments or their average over a group of images. Averages of moments add up, so a
group's statistics are exact however the group is cut into calls; taking them about r keeps M2 - M1^2 free of
cancellation where the feature map follows the teacher's training data. Where averages alone are wanted, those of a call
come from the map in two readings of it, and no image's own are formed (`moments_together`).

Two ways to record them: hooks on the layers as they are (`record_bn_inputs`), or layers replaced by a kernel that
computes batch norm, moments and a ReLU behind it in one pass over the map (`FusedTeacher`, kernels "triton").
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd.errors import UsageError
from dfkd_kernels.bn_moments import bn_moments

T = TypeVar("T")
_RELUS = (F.relu, torch.relu, torch.relu_)
_RELU_METHODS = ("relu", "relu_")


class Moments(NamedTuple):
    """Moments of one layer's input about its running mean: m1, m2 [B, C] of every image, or their average [1, C]."""

    m1: Tensor
    m2: Tensor


def moments_of(x: Tensor, layer: nn.BatchNorm2d) -> Moments:
    """Moments [B, C] of a layer's input x [B, C, H, W]; float32 at least."""
    assert layer.running_mean is not None
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return moments_about(x, layer.running_mean.to(x))


def moments_about(x: Tensor, mean: Tensor) -> Moments:
    """Moments [B, C] of x [B, C, H, W] about a mean [C], in the dtype of x."""
    moments: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _Moments.apply
    return Moments(*moments(x, mean))


class _Moments(torch.autograd.Function):
    """Both moments of each channel about r, with their gradient g1 / n + 2 g2 / n (x - r), n = H W, as two operations.

    Autograd takes five, some of them on maps of other strides than those of x: the same bits in several times the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        x = x - mean[None, :, None, None]
        ctx.save_for_backward(x)
        return x.mean((2, 3)), x.square().mean((2, 3))

    @staticmethod
    def backward(ctx: Any, in_m1: Tensor, in_m2: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        pixels = x.shape[2] * x.shape[3]
        slope, offset = (2 * (in_m2 / pixels))[:, :, None, None], (in_m1 / pixels)[:, :, None, None]
        return x * slope + offset, None


def moments_together(x: Tensor, layer: nn.BatchNorm2d) -> Moments:
    """The average [1, C] of the moments of a layer's input x [B, C, H, W] over its images; float32 at least."""
    assert layer.running_mean is not None
    moments: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _Together.apply
    m1, m2 = moments(x, layer.running_mean.to(torch.promote_types(x.dtype, torch.float32)))
    return Moments(m1[None], m2[None])


class _Together(torch.autograd.Function):
    """Both moments [C] about r over all images and pixels, by the two readings of a map of a BatchNorm in training.

    That kernel takes any memory order and half precision, sums in float32 and gives the variance about the mean, so
    that m2 = var + m1^2 has no cancellation. The gradient g1 / n + 2 g2 / n (x - r), n = B H W, is a BatchNorm of the
    map in turn, in the map's own dtype. No map is written besides, where the definitions write two, or four in half
    precision; a map does not fit a CPU's cache, and takes as long to write as to compute.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, mean)
        scratch = mean.clone(), torch.ones_like(mean)  # written to, times a momentum of 0
        own, variance = torch.batch_norm_update_stats(x, *scratch, 0.0)
        m1 = own - mean
        return m1, variance + m1.square()

    @staticmethod
    def backward(ctx: Any, in_m1: Tensor, in_m2: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        count = x.shape[0] * x.shape[2] * x.shape[3]
        return F.batch_norm(x, mean, torch.ones_like(mean), 2 * in_m2 / count, in_m1 / count, eps=0.0), None


@contextmanager
def record_bn_inputs(layers: Sequence[nn.BatchNorm2d], together: bool = False) -> Iterator[list[Moments]]:
    """Record one forward pass: the list is filled when the block ends, a Moments per layer in the order of `layers`.

    A network may call its layers in another order: many ResNets define the projection before the branch.
    together: averages [1, C] over the images of the pass, instead of moments [B, C] of each.
    Raises UsageError for a layer that was not used exactly once.
    """
    calls: list[list[Moments]] = [[] for _ in layers]
    recorded: list[Moments] = []
    taken = moments_together if together else moments_of

    def read(into: list[Moments], layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        into.append(taken(inputs[0], layer))

    handles = [layer.register_forward_pre_hook(partial(read, into)) for layer, into in zip(layers, calls, strict=True)]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
    recorded += once_each(calls)


def once_each(calls: Sequence[Sequence[T]]) -> list[T]:
    """The one item of every layer. Raises UsageError for a layer that was not used exactly once in a pass."""
    for index, found in enumerate(calls):
        if len(found) != 1:
            what = f"BatchNorm layer {index} was used {len(found)} times in a pass"
            raise UsageError(what, "its statistics are those of one use", "use --bn-weight 0 for this teacher")
    return [found[0] for found in calls]


def bn_distance(moments: Sequence[Moments], layers: Sequence[nn.BatchNorm2d], distance: str) -> Tensor:
    """How far moments [B or 1, C] lie from the running statistics: [B] or [1].

    norm      sum over layers of ||var - rvar||_2 + ||mean - rmean||_2, norms over channels (DiffDFKD, arXiv 2504.00870)
    relative  mean over layers and channels of ((mean - rmean)/rstd)^2 + (std/rstd - 1)^2, free of a layer's scale
    """
    total = moments[0].m1.new_zeros(moments[0].m1.shape[0])
    for (m1, m2), layer in zip(moments, layers, strict=True):
        assert layer.running_var is not None
        variance = (m2 - m1.square()).clamp_min(0)
        reference = layer.running_var.to(m1)
        if distance == "norm":
            # the root's gradient is infinite at 0; 1e-12 is far below any statistic in float32
            spread = (variance - reference).square().sum(1).add(1e-12).sqrt()
            total = total + spread + m1.square().sum(1).add(1e-12).sqrt()
        else:
            scale = (reference + layer.eps).rsqrt()
            ratio = (variance + layer.eps).sqrt() * scale
            total = total + ((m1 * scale).square() + (ratio - 1).square()).mean(1) / len(layers)
    return total


def averaged(moments: Sequence[Moments]) -> list[Moments]:
    """Moments of every image [G, C], or their averages [1, C] -> the group's [1, C]."""
    return [Moments(m1.mean(0, keepdim=True), m2.mean(0, keepdim=True)) for m1, m2 in moments]


def averaged_over(parts: Sequence[Sequence[Moments]], images: Sequence[int]) -> list[Moments]:
    """Moments of several calls, each a Moments per layer, [B, C] or [1, C] -> the average [1, C] over all images.

    images: how many there are in each call.
    """
    found, total = [averaged(part) for part in parts], sum(images)

    def mean(of: Sequence[Tensor]) -> Tensor:
        return torch.stack([own * (count / total) for own, count in zip(of, images, strict=True)]).sum(0)

    return [Moments(mean([m.m1 for m in of]), mean([m.m2 for m in of])) for of in zip(*found, strict=True)]


def joined(parts: Sequence[Sequence[Moments]]) -> list[Moments]:
    """Moments of every image in several calls, each a Moments per layer -> those of all their images."""
    return [Moments(torch.cat([m.m1 for m in of]), torch.cat([m.m2 for m in of])) for of in zip(*parts, strict=True)]


def side_by_side(moments: Sequence[Moments]) -> tuple[Tensor, Tensor]:
    """Moments of every layer [B, C_l] -> two tensors [B, K], K = sum of C_l."""
    return torch.cat([m.m1 for m in moments], 1), torch.cat([m.m2 for m in moments], 1)


def by_layer(layers: Sequence[nn.BatchNorm2d], m1: Tensor, m2: Tensor) -> list[Moments]:
    """The inverse of `side_by_side`: two tensors [B, K] -> moments of every layer [B, C_l]."""
    sizes = [layer.running_mean.numel() for layer in layers if layer.running_mean is not None]
    return [Moments(a, b) for a, b in zip(torch.split(m1, sizes, 1), torch.split(m2, sizes, 1), strict=True)]


class RecordingLayer(nn.Module):
    """A BatchNorm layer, or one and the ReLU behind it, on [B, C, H, W]: its output, and the moments of its input.

    The layer's tensors are read where they are. A layer that computes something else than batch norm, as those of timm
    with an activation inside, runs as it is beside the moments by their definition.
    """

    def __init__(self, layer: nn.BatchNorm2d, relu: bool) -> None:
        super().__init__()
        self.layer, self.relu, self.fused = layer, relu, is_plain(layer)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # its name in a BatchNorm's forward()
        layer = self.layer
        if not self.fused:
            return type(layer).forward(layer, input), *moments_of(input, layer)
        assert layer.running_mean is not None and layer.running_var is not None
        return bn_moments(input, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps, self.relu)


def is_plain(layer: nn.Module) -> bool:
    """Whether its forward() is batch norm with running statistics in evaluation mode, and nothing beside."""
    frozen = type(layer).__name__ == "FrozenBatchNorm2d"  # of torchvision and detectron2, whose tensors are buffers
    return frozen or type(layer).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


@dataclass(frozen=True)
class FusedTeacher:
    """A teacher's network whose BatchNorm layers are one launch each with their moments.

    Hooks read every map again after the layer, the ReLU behind it and the gradients of all three. A ReLU is taken into
    the launch only where it is proven to be all that reads the layer, by torch.fx, which writes the network down as a
    graph of calls. Of a network that fx cannot follow, such as one that decides its way by values, every layer stands
    alone and is replaced for the time of a pass.

    recording: one a layer, in the order of the layers. graph: images -> logits and the moments of the layers in turn;
    None where fx cannot follow the network. why: the reason for that.
    """

    network: nn.Module
    recording: tuple[RecordingLayer, ...]
    graph: fx.GraphModule | None
    why: str = ""

    @staticmethod
    def of(network: nn.Module, layers: Sequence[nn.BatchNorm2d]) -> "FusedTeacher":
        """The teacher's network with its BatchNorm layers recorded, as one fx graph where it can be traced.

        layers: those to record, in evaluation mode. Without a graph (`why` says what stands against one, which may be
        the network's own attribute `untraceable`) each layer records by itself. Raises UsageError: a layer in training
        mode, or one that the graph does not use exactly once.
        """
        if training := [index for index, layer in enumerate(layers) if layer.training]:
            what = f"BatchNorm layer {training[0]} is in training mode"
            raise UsageError(what, "its running statistics are what is wanted", "call eval() on the teacher")
        alone = tuple(RecordingLayer(layer, False) for layer in layers)
        if why := getattr(network, "untraceable", ""):
            return FusedTeacher(network, alone, None, why)
        if network._forward_hooks or network._forward_pre_hooks:
            return FusedTeacher(network, alone, None, "it has hooks, which fx leaves out")
        try:
            traced = fx.GraphModule(network, _Tracer(layers).trace(network))
        except Exception as error:  # of any kind: fx runs the network's own Python on what are no tensors
            why = (str(error).strip() or "no message").partition("\n")[0]
            return FusedTeacher(network, alone, None, f"{type(error).__name__}: {why}")
        return FusedTeacher(network, _replaced(traced, layers), traced)

    def __call__(self, images: Tensor) -> tuple[Tensor, list[Moments]]:
        """Normalised images -> logits [B, classes] and moments [B, C] of every layer, in the order of the layers."""
        if self.graph is not None:
            logits, moments = self.graph(images)
            return logits, [Moments(m1, m2) for m1, m2 in moments]
        with _patched(self.recording) as calls:
            logits = self.network(images)
        return logits, once_each(calls)

    def describe(self) -> str:
        """How many layers are a launch of their own, and how many with a ReLU, for people."""
        fused, relus = (sum(getattr(layer, name) for layer in self.recording) for name in ("fused", "relu"))
        found = f"{fused} of {len(self.recording)} BatchNorm layers with their moments in a launch, {relus} with their"
        return f"{found} ReLU" + (f" (fx cannot follow the teacher: {self.why})" if self.graph is None else "")


class _Tracer(fx.Tracer):
    """Takes the layers that are recorded for calls, also those of other libraries."""

    def __init__(self, layers: Sequence[nn.BatchNorm2d]) -> None:
        super().__init__()
        self.layers = set(map(id, layers))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self.layers or super().is_leaf_module(m, module_qualified_name)


def _replaced(traced: fx.GraphModule, layers: Sequence[nn.BatchNorm2d]) -> tuple[RecordingLayer, ...]:
    """Replace every layer of a graph, and put the moments beside the logits. Raises UsageError as `once_each`."""
    graph = traced.graph
    calls = {id(layer): list[fx.Node]() for layer in layers}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.get(id(traced.get_submodule(node.target)), []).append(node)
    recording, moments = [], []
    for index, node in enumerate(once_each([calls[id(layer)] for layer in layers])):
        readers = list(node.users)
        relu = readers[0] if is_plain(layers[index]) and len(readers) == 1 and _is_relu(readers[0], traced) else None
        recording.append(RecordingLayer(layers[index], relu is not None))
        traced.add_submodule(f"recording_{index}", recording[-1])
        with graph.inserting_before(node):
            found = graph.call_module(f"recording_{index}", node.args, node.kwargs)
            y, m1, m2 = (graph.call_function(_item, (found, place)) for place in range(3))
        moments.append((m1, m2))
        for replaced in (node,) if relu is None else (relu, node):
            replaced.replace_all_uses_with(y)
            graph.erase_node(replaced)
    (output,) = graph.find_nodes(op="output")
    output.args = ((output.args[0], moments),)
    graph.lint()
    traced.recompile()
    return tuple(recording)


def _item(found: tuple[Tensor, ...], place: int) -> Tensor:
    return found[place]


def _is_relu(node: fx.Node, traced: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return type(traced.get_submodule(str(node.target))) is nn.ReLU
    return node.target in _RELU_METHODS if node.op == "call_method" else node.target in _RELUS


@contextmanager
def _patched(recording: Sequence[RecordingLayer]) -> Iterator[list[list[Moments]]]:
    """Replace the layers' forward() for the time of a pass; gives the moments of every call, by layer."""
    calls: list[list[Moments]] = [[] for _ in recording]

    def replaced(own: RecordingLayer, into: list[Moments]) -> None:
        def forward(input: Tensor) -> Tensor:
            y: Tensor
            y, m1, m2 = own(input)
            into.append(Moments(m1, m2))
            return y

        own.layer.forward = forward  # type: ignore[method-assign]

    try:
        for own, into in zip(recording, calls, strict=True):
            replaced(own, into)
        yield calls
    finally:
        for own in recording:
            vars(own.layer).pop("forward", None)
