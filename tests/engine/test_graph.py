"""Graphs equal autograd in float64, sample by sample, at batches other than the traced one; and what they refuse."""

import copy
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from dfkd_engine.errors import EngineError
from dfkd_engine.graph import trace
from dfkd_engine.spec import TensorSpec
from dfkd_engine.tracing.operations import ALLOWED
from tests.engine import small_graphs
from tests.engine.small_functions import (
    CLASSES,
    TEACHERS,
    Attention,
    PixelGradient,
    ValueAndGradient,
    errors,
    examples,
    frozen,
    images,
    in_float64,
    teacher,
)
from tests.tiny_sd import TINY_VAE, UNET, VAE, WIDTH

FORWARD, GRADIENT = 1e-5, 1e-4  # relative, float32
BATCHES = (2, 7)  # traced with another


def spec(*shape, name="x", dtype="float32"):
    return TensorSpec(name, (None, *shape), dtype)


def check_plain(graph):
    """No backward operation, none beyond the allowed set, nothing in float64, and no size of the traced batch."""
    for node in graph.module.graph.nodes:
        assert "backward" not in str(node.target)
        assert node.op != "call_function" or node.target in ALLOWED
    for value in graph.module.buffers():
        assert value.dtype != torch.float64


def check_equal(graph, function, specs, outputs, forward=FORWARD, gradient=GRADIENT, exact=None):
    """outputs: "f" for values, "g" for gradients. Gradients where eager itself sits on a kink are not judged."""
    check_plain(graph)
    wide = exact or in_float64(function)
    for batch in BATCHES:
        inputs = examples(specs, batch, seed=batch)
        got, want, eager = graph(*inputs), wide(*inputs), function(*inputs)
        want, eager = ((r,) if isinstance(r, torch.Tensor) else r for r in (want, eager))
        assert len(got) == len(want) == len(outputs)
        for kind, ours, exact, plain in zip(outputs, got, want, eager, strict=True):
            assert ours.shape == exact.shape and ours.dtype == plain.dtype
            limit = forward if kind == "f" else gradient
            smooth = errors(plain, exact) <= limit
            assert smooth.float().mean() >= 0.5
            worst = errors(ours, exact)[smooth].max().item()
            assert worst <= limit, f"batch {batch}: {worst:.1e}"


# --- single layers --------------------------------------------------------------------------------------------------
CONVOLUTIONS = {
    "plain": (nn.Conv2d(4, 6, 3, padding=1), (7, 8)),
    "no padding, even kernel": (nn.Conv2d(4, 6, (2, 4)), (7, 8)),
    "more padding than kernel": (nn.Conv2d(4, 6, 1, padding=2), (5, 6)),
    "strided, with a remainder": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (8, 7)),
    "strided and dilated": (nn.Conv2d(4, 6, 3, stride=(2, 3), padding=(0, 2), dilation=(2, 1)), (11, 12)),
    "grouped": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (6, 7)),
    "depthwise, strided": (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4), (6, 7)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (5, 6)),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (5, 6)),
    "same padding": (nn.Conv2d(4, 6, (3, 4), padding="same"), (6, 7)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    layer, size = CONVOLUTIONS[name]
    layout = torch.channels_last if name in ("plain", "grouped") else torch.contiguous_format
    layer = layer.requires_grad_(False).to(memory_format=layout)
    function, specs = ValueAndGradient(layer), [spec(4, *size)]
    check_equal(trace(function, specs), function, specs, "fg")


def test_stride_1_gradients_are_convolutions():
    layer = nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)
    graph = trace(ValueAndGradient(layer), [spec(4, 5, 5)])
    found = [node for node in graph.module.graph.nodes if node.target is torch.ops.aten.convolution.default]
    assert len(found) == 2 and not any(node.args[6] for node in found)


def rounded(x):
    """Many equal neighbours, and a slope of 1: windows have more than one maximum."""
    return x - x.detach() + (2 * x.detach()).round()


LAYERS = {
    "max pool, overlapping": (lambda x: F.max_pool2d(x, 3, 2, 1), (3, 9, 8)),
    "max pool, ceil": (lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), (3, 8, 10)),
    "max pool, dilated": (lambda x: F.max_pool2d(x, (2, 3), (1, 2), (1, 1), (2, 1)), (3, 9, 8)),
    "max pool, stride above kernel": (lambda x: F.max_pool2d(x, 2, 3), (3, 9, 8)),
    "max pool, stride 1": (lambda x: F.max_pool2d(x, 3, 1, 1), (3, 5, 6)),
    "max pool of equal values": (lambda x: F.max_pool2d(rounded(x), 3, 2, 1), (3, 9, 8)),
    "average pool": (lambda x: F.avg_pool2d(x, 2), (3, 6, 8)),
    "average pool, padded": (lambda x: F.avg_pool2d(x, 3, 2, 1), (3, 9, 8)),
    "average pool, padding not counted": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (3, 9, 8)),
    "average pool, ceil": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), (3, 8, 10)),
    "average pool, divisor": (lambda x: F.avg_pool2d(x, (2, 3), divisor_override=5), (3, 6, 9)),
    "adaptive pool to 1": (lambda x: F.adaptive_avg_pool2d(x, 1), (3, 6, 8)),
    "adaptive pool": (lambda x: F.adaptive_avg_pool2d(x, (3, 5)), (3, 7, 8)),
    "nearest x2": (lambda x: F.interpolate(x, scale_factor=2.0), (3, 4, 5)),
    "nearest by size": (lambda x: F.interpolate(x, (6, 7)), (3, 4, 5)),
    "nearest-exact": (lambda x: F.interpolate(x, (6, 7), mode="nearest-exact"), (3, 4, 5)),
    "bicubic down": (lambda x: F.interpolate(x, [5, 4], mode="bicubic", align_corners=False), (3, 9, 7)),
    "bicubic by factor": (lambda x: F.interpolate(x, scale_factor=1.7, mode="bicubic"), (3, 5, 6)),
    "bilinear, corners": (lambda x: F.interpolate(x, (9, 7), mode="bilinear", align_corners=True), (3, 4, 5)),
    "bicubic, antialiased": (lambda x: F.interpolate(x, (4, 3), mode="bicubic", antialias=True), (3, 9, 7)),
    "bicubic, antialiased, larger": (lambda x: F.interpolate(x, (9, 8), mode="bicubic", antialias=True), (3, 4, 7)),
    "area": (lambda x: F.interpolate(x, (3, 5), mode="area"), (3, 7, 8)),
    "softmax": (lambda x: F.softmax(x, -1), (4, 7)),
    "log softmax": (lambda x: F.log_softmax(x, 1), (7,)),
    "logsumexp": (lambda x: x.logsumexp(1, keepdim=True), (7,)),
    "softplus": (lambda x: F.softplus(x, 2, 20), (7,)),
    "chunk": (lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].exp(), (6, 4)),
    "channel shuffle": (lambda x: torch.stack(x.chunk(2, 1), 2).flatten(1, 2) ** 2, (6, 4, 4)),
    "slices": (lambda x: torch.cat([x[:, 1:4], x[:, -1:], x[:, 0, None]], 1).sin(), (5, 4)),
    "slices with steps": (lambda x: x[:, :, ::2, 1::3].square(), (2, 5, 8)),
    "padding": (lambda x: F.pad(x, (1, 2, 0, -1), value=1.0).square(), (2, 5, 4)),
    "in place": (lambda x: (x.exp() + 1).mul_(2).add_(x) + F.relu(x * 2, inplace=True), (5,)),
    "deviation": (lambda x: x.std(1, correction=0) + torch.linalg.vector_norm(x, dim=1), (7,)),
    "whole sum": (lambda x: (x.square().sum() * x.mean()).expand(x.shape[0]) + x[:, 0], (7,)),
    "minimum": (lambda x: torch.minimum(x, 0.5 * x.square()) + x.amax(1, keepdim=True), (7,)),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2).square(), (8, 3, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_functions(name):
    function, shape = LAYERS[name]
    function, specs = ValueAndGradient(function), [spec(*shape)]
    check_equal(trace(function, specs), function, specs, "fg")


MODULES = {
    "batch norm": (nn.BatchNorm2d(6), (6, 4, 3)),
    "batch norm, not affine": (nn.BatchNorm2d(6, affine=False), (6, 4, 3)),
    "group norm": (nn.GroupNorm(3, 6), (6, 4, 3)),
    "group norm of sequences": (nn.GroupNorm(3, 6), (6, 5)),
    "layer norm": (nn.LayerNorm(6), (4, 6)),
    "layer norm of two axes": (nn.LayerNorm((4, 6), elementwise_affine=False), (3, 4, 6)),
    "relu6": (nn.ReLU6(), (9,)),
    "hardswish": (nn.Hardswish(), (9,)),
    "hardsigmoid": (nn.Hardsigmoid(), (9,)),
    "silu": (nn.SiLU(inplace=True), (9,)),
    "gelu": (nn.GELU(), (9,)),
    "gelu, tanh": (nn.GELU(approximate="tanh"), (9,)),
    "mish": (nn.Mish(), (9,)),
    "linear": (nn.Linear(6, 4), (3, 6)),
    "attention": (Attention(), (5, 8)),
    "causal attention": (Attention(is_causal=True, scale=0.3), (5, 8)),
    "masked attention": (Attention(attn_mask=torch.ones(5, 5).tril().flip(1).bool() | torch.eye(5).bool()), (5, 8)),
}


@pytest.mark.parametrize("name", MODULES)
def test_layers(name):
    layer, shape = MODULES[name]
    # ValueAndGradient gives the layer its leaf, into which a layer in place may not write
    function, specs = ValueAndGradient(nn.Sequential(nn.Identity(), Twice(), frozen(layer))), [spec(*shape)]
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    check_equal(trace(function, specs), function, specs, "fg")


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(reduction, weighted):
    specs = [spec(CLASSES, name="logits"), TensorSpec("labels", (None,), "int64")]

    def function(logits, labels):
        leaf = logits.detach().requires_grad_()
        weight = torch.linspace(1, 2, CLASSES).to(logits) if weighted else None
        with torch.enable_grad():
            loss = F.cross_entropy(leaf, labels, weight, ignore_index=2, reduction=reduction)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach().expand(logits.shape[0]), gradient

    check_equal(trace(function, specs), function, specs, "fg")


# --- whole networks -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TEACHERS)
def test_teachers(name):
    size, network = teacher(name)
    function, specs = PixelGradient(network), images(size)
    graph = trace(function, specs)
    # a float32 loss of BatchNorm statistics carries the errors of two sums over its whole feature map
    check_equal(graph, function, specs, "gff" if function.layers else "gf", forward=2e-5)


class Decode:
    def __init__(self, network):
        self.vae = network

    def __call__(self, z):
        return self.vae.decode(z).sample


@cache
def vae(kind):
    torch.manual_seed(0)
    kl = VAE | {"block_out_channels": (8, 8), "norm_num_groups": 4}
    kl |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return frozen(AutoencoderKL(**kl) if kind == "kl" else AutoencoderTiny(**TINY_VAE))


Z = spec(4, 3, 4, name="z")


@cache
def decoder_graphs():
    """The KL decoder, forward and with its gradient."""
    decode = Decode(vae("kl"))
    return trace(decode, [Z]), trace(ValueAndGradient(decode), [Z])


def test_decoders():
    check_equal(decoder_graphs()[1], ValueAndGradient(Decode(vae("kl"))), [Z], "fg")
    tiny = ValueAndGradient(Decode(vae("tiny")))
    check_equal(trace(tiny, [Z]), tiny, [Z], "fg")


def test_decoder_beyond_the_batch_at_which_diffusers_branches():
    (z,) = examples([Z], 65)
    assert errors(decoder_graphs()[0](z)[0], Decode(vae("kl"))(z)).max() <= FORWARD


UNET_SPECS = (spec(4, 4, 4, name="z"), spec(name="t", dtype="int64"), spec(7, WIDTH, name="context"))


class Denoise:
    def __init__(self, network):
        self.unet = network

    def __call__(self, z, t, context):
        return self.unet(z, t, encoder_hidden_states=context).sample


@pytest.mark.parametrize("processor", [AttnProcessor2_0, AttnProcessor])
def test_unet(processor):
    torch.manual_seed(0)
    # groups of two numbers, as 32 would leave in the middle, are normalised to -1 and 1 or the other way round
    own = {"layers_per_block": 1, "norm_num_groups": 8, "block_out_channels": (32, 32), "mid_block_type": None}
    own |= {"down_block_types": UNET["down_block_types"][2:], "up_block_types": UNET["up_block_types"][:2]}
    network = frozen(UNet2DConditionModel(**(UNET | own)))
    network.set_attn_processor(processor())
    check_equal(trace(Denoise(network), UNET_SPECS), Denoise(network), UNET_SPECS, "f")


def test_gradient_through_a_decoder_and_a_teacher():
    networks, specs = small_graphs.networks(), small_graphs.INPUTS["gradient"]
    exact = networks.to("cpu", torch.float64).function("gradient")
    graph = small_graphs.graph("gradient")
    assert graph.outputs == small_graphs.OUTPUTS["gradient"]
    check_equal(graph, networks.function("gradient"), specs, "gf", exact=lambda z, labels: exact(z.double(), labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_norms_and_softmax_in_float32(dtype):
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.GroupNorm(2, 6),
        nn.SiLU(),
        nn.Flatten(2),
        nn.Linear(16, 8),
        Attention(),
    )
    network = frozen(network).to(dtype)
    specs = [spec(3, 6, 6, dtype=str(dtype).removeprefix("torch."))]
    function = ValueAndGradient(network)
    graph = trace(function, specs)
    check_plain(graph)
    norm, ordered = torch.ops.aten.native_group_norm.default, torch.ops.aten.contiguous.default
    found = [node for node in graph.module.graph.nodes if node.target in (norm, torch.ops.aten._softmax.default)]
    sources = [node.args[0].args[0] if node.args[0].target is ordered else node.args[0] for node in found]
    assert [source.target for source in sources] == [torch.ops.aten._to_copy.default] * 2
    assert all(source.kwargs["dtype"] == torch.float32 for source in sources)
    wide = in_float64(function)
    (x,) = examples(specs, 5)
    for got, want, eager in zip(graph(x), wide(x), function(x), strict=True):
        assert got.dtype == dtype
        # no worse than autograd in the same precision, which rounds at other places
        assert errors(got, want).max() <= 2 * errors(eager, want).max()


# --- what a graph is ------------------------------------------------------------------------------------------------
def test_constants_are_the_parameters():
    decoder, graph = vae("kl"), decoder_graphs()[0]
    held = dict(graph.module.named_buffers())
    weight = decoder.decoder.conv_in.weight
    assert held["vae_decoder_conv_in_weight"].data_ptr() == weight.data_ptr()
    assert held["vae_decoder_conv_in_weight"].stride() == weight.stride()  # channels_last stays
    assert not any(name.startswith("encoder") for name in held)


def test_gradients_keep_the_memory_format_of_weights():
    network = frozen(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU()))
    graph = trace(ValueAndGradient(network), [spec(3, 6, 6)])
    kernels = [value for value in graph.module.buffers() if value.dim() == 4]
    assert len(kernels) == 2 and all(k.is_contiguous(memory_format=torch.channels_last) for k in kernels)


def test_nodes_know_their_layer():
    nodes = decoder_graphs()[1].module.graph.nodes
    convolutions = [node for node in nodes if "convolution" in str(node.target)]
    assert "f.vae.decoder.up_blocks.0.resnets.1.conv1" in {node.meta["module"] for node in convolutions}
    assert convolutions[-1].meta["module"].endswith("post_quant_conv")  # the backward pass ends where it began


def test_nothing_is_copied_in_vain():
    graph = decoder_graphs()[0]
    names = {str(node.target) for node in graph.module.graph.nodes}
    assert not names & {"aten.clone.default", "aten.detach.default", "aten.alias.default", "aten.view.default"}


def test_argument_names_may_be_those_of_operations():
    graph = trace(lambda t, silu: F.silu(t) + silu, [spec(3, name="t"), spec(3, name="silu")])
    assert [node.name for node in graph.module.graph.find_nodes(op="placeholder")] == ["t", "silu"]
    torch.testing.assert_close(graph(torch.ones(2, 3), torch.zeros(2, 3))[0], F.silu(torch.ones(2, 3)))


# --- what is refused ------------------------------------------------------------------------------------------------
class Odd(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), Call(function)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


REFUSED = {
    "linalg_inv_ex": lambda x: torch.linalg.inv(x),
    "bernoulli|dropout": lambda x: F.dropout(x, 0.5),
    "sort": lambda x: x.sort(1).values,
    "nonzero": lambda x: x[:, : len(x.nonzero())],
    "_local_scalar_dense": lambda x: x * 2 if x.sum() > 0 else x,
}


@pytest.mark.parametrize("operation", REFUSED)
def test_unknown_operations_are_named_with_their_layer(operation):
    network = SimpleNamespace(vae=Odd(REFUSED[operation]))
    with pytest.raises(EngineError, match=rf"({operation}).* of f\.0\.vae\.blocks\.1"):
        trace(ValueAndGradient(partial(lambda network, x: network.vae(x), network)), [spec(4, 4)])


def test_unknown_backward_operations_are_named_with_their_layer():
    sampling = Odd(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2))
    with pytest.raises(EngineError, match=r"aten\..* of f\.blocks\.1"):
        trace(ValueAndGradient(sampling), [spec(3, 4, 4)])
    cumulative = Odd(lambda x: x.cummax(1).values)
    with pytest.raises(EngineError, match=r"aten\..* of f\.blocks\.1"):
        trace(ValueAndGradient(cumulative), [spec(3, 4)])


def test_gradients_of_weights_are_refused():
    layer = nn.Linear(3, 2)

    def function(x):
        with torch.enable_grad():
            return torch.autograd.grad(layer(x).sum(), layer.weight)[0]

    with pytest.raises(EngineError, match="weights are frozen"):
        trace(function, [spec(3)])

    def accumulates(x):
        with torch.enable_grad():
            layer(x).sum().backward()
        return x

    with pytest.raises(EngineError, match="weights, which are frozen"):
        trace(accumulates, [spec(3)])
    assert layer.weight.grad is None


def test_a_fixed_batch_is_refused_with_the_line():
    with pytest.raises(EngineError, match=r"the batch of 'x' is not free.*test_graph\.py"):
        trace(lambda x: x / len(x), [spec(3)])


def test_training_networks_are_refused():
    with pytest.raises(EngineError, match=r"statistics of its batch.*eval"):
        trace(ValueAndGradient(nn.BatchNorm2d(3).requires_grad_(False)), [spec(3, 2, 2)])


def test_float64_is_refused():
    with pytest.raises(EngineError, match="float64"):
        trace(lambda x: (x.double() * 3).float(), [spec(3)])


def test_shapes_of_results():
    with pytest.raises(EngineError, match=r"'output' has the shape.*first size"):
        trace(lambda x: x.t(), [spec(3)])
    with pytest.raises(EngineError, match=r"returns 2 tensors: 1 are named: y"):
        trace(lambda x: (x, x), [spec(3)], output_names=("y",))


def test_views_written_in_place_are_refused():
    def function(x):
        y = x * 2
        y[:, 0].add_(1)
        return y

    with pytest.raises(EngineError, match="writes into a tensor"):
        trace(function, [spec(3)])


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_on_an_input_that_is_not_contiguous_is_one_product(bias):
    layer = frozen(nn.Linear(5, 3, bias=bias))

    def call(x):
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            out = layer(leaf.transpose(1, 2)[:, 1:])
            (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
        return out.detach(), gradient

    graph = trace(call, (spec(5, 4),), output_names=("out", "gradient"))
    targets = [node.target for node in graph.module.graph.nodes]
    assert torch.ops.aten.bmm.default not in targets
    assert sum(target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) for target in targets) == 2
    wide = copy.deepcopy(layer).double()
    for batch in BATCHES:
        x = torch.randn(batch, 5, 4)
        out = wide(x.double().transpose(1, 2)[:, 1:])
        torch.testing.assert_close(graph(x)[0].double(), out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(graph(x)[1], call(x)[1], rtol=1e-5, atol=1e-5)
