"""Teachers with taps against the hooks of the definition: L_bn, gradients, and which ReLU goes into a launch."""

import copy
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfkd.config import BN_LOSSES
from dfkd.compiled.guidance import CompiledGuidance
from dfkd.synthesis import taps as module
from dfkd.synthesis.guidance import Guidance, LossWeights, identity
from dfkd.synthesis.statistics import tapped
from dfkd.synthesis.taps import Taps
from dfkd.teachers import Classifier, build
from dfkd_engine.group_norms import set_group_norms
from dfkd_engine.networks import load_prior
from dfkd_kernels.rows import NetworkInput
from tests.synthesis.small_networks import SmallPrior, bn_inputs, classifier, plain_bn_loss, plain_loss
from tests.synthesis.small_sd import make_small_sd

pytest.importorskip("triton", reason="the kernels need Triton")
# the same on a GPU, natively: tests/kernels
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernel is not interpreted here")
F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-9}
LABELS = torch.tensor([0, 1, 2, 0, 1])


def trained(module, size=32):
    """Frozen, with the running statistics of images that are not those of a test, as after training."""
    g = torch.Generator().manual_seed(1)
    module.train()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # averages
    with torch.no_grad():
        module(torch.randn(16, 3, size, size, generator=g))
    return module.eval().requires_grad_(False)


def teacher_of(module, size=32):
    return Classifier(module, "own", ("a", "b", "c"), size, (0.5, 0.4, 0.6), (0.2, 0.3, 0.25))


def gradient_of(function, x):
    leaf = x.detach().requires_grad_()
    found = function(leaf)
    return found.detach(), torch.autograd.grad(found.sum(), leaf)[0]


@pytest.mark.parametrize(
    "name, fused, side", [("resnet8", 4, 32), ("wrn16_1", 13, 32), ("vgg8", 5, 32), ("mobilenetv2", 0, 64)]
)
def test_whole_teachers_have_the_loss_and_gradient_of_the_definition(name, fused, side):
    """To 1e-5 in float32, per image and of the group: of L_bn itself, and of its gradient as a vector.

    Where hooks in float32 are not that near float64 themselves, as after 52 untrained layers, to twice their error.
    """
    torch.manual_seed(0)
    teacher = teacher_of(trained(build(name, 3), side), side)
    exact = replace(teacher, module=copy.deepcopy(teacher.module).double())
    layers = teacher.batch_norms()
    found = Taps.of(teacher.module, layers)
    assert found.graph is not None and sum(tap.relu for tap in found.taps) == fused
    assert found.in_words() == (
        f"{len(layers)} of {len(layers)} BatchNorm layers with their moments in a launch, {fused} with their ReLU"
    )
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    for stats in ("image", "group"):
        for kind in BN_LOSSES:
            weights = LossWeights(1.0, 0.0, bn_stats=stats, bn_loss=kind)
            guidance = Guidance(identity, teacher, weights, loss_dtype=torch.float32, kernels="triton", taps=found)
            gradient, losses = guidance.of_batch(images, LABELS[:2])
            loss, hooked = gradient_of(partial(defined, teacher, stats, kind), images)
            _, wanted = gradient_of(partial(defined, exact, stats, kind), images.double())
            torch.testing.assert_close(losses["bn"].sum(), loss.sum(), rtol=1e-5, atol=0)
            error, allowed = ((g.double() - wanted).norm() / wanted.norm() for g in (gradient, hooked))
            assert error < max(1e-5, 2 * allowed), (stats, kind, error, allowed)
            assert allowed < (2e-6 if side == 32 else 5e-5)


def defined(teacher, stats, kind, x):
    """L_bn of images by hooks, a number each, or a group's once for each of its images."""
    inputs = bn_inputs(teacher, x)[1]
    if stats == "group":
        return len(x) * plain_bn_loss(inputs, kind)
    return torch.stack([plain_bn_loss([(v[i : i + 1], n) for v, n in inputs], kind) for i in range(len(x))])


@pytest.mark.parametrize("kind", BN_LOSSES)
@pytest.mark.parametrize("stats", ["image", "group"])
@pytest.mark.parametrize("micro", [2, 5])
def test_a_whole_guidance_gradient(stats, kind, micro):
    """CE and L_bn through decoder and teacher, in one call and in several."""
    prior, teacher = SmallPrior(dtype=F64), classifier(dtype=F64)
    z = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(5), dtype=F64)
    weights = LossWeights(0.3, 0.7, bn_stats=stats, bn_loss=kind)
    gradient, losses = Guidance(prior.decode, teacher, weights, kernels="triton").gradient(z, LABELS, micro)
    plain, recorded = Guidance(prior.decode, teacher, weights).gradient(z, LABELS, micro)
    loss, wanted = gradient_of(lambda leaf: plain_loss(prior, teacher, leaf, LABELS, 0.3, 0.7, stats, kind), z)
    torch.testing.assert_close(gradient, wanted, **EXACT)
    torch.testing.assert_close(gradient, plain, **EXACT)
    torch.testing.assert_close((0.3 * losses["bn"] + 0.7 * losses["cls"]).sum(), loss, **EXACT)
    assert all(torch.allclose(losses[name], recorded[name], **EXACT) for name in ("bn", "cls"))


@pytest.mark.parametrize(
    "derive",
    [
        lambda g, p: g,
        lambda g, p: g.on_pixels(),
        lambda g, p: g.at_decoder(p),
        lambda g, p: g.statistics_alone(),
        lambda g, p: CompiledGuidance(g, {}),
        lambda g, p: CompiledGuidance(g, {}).on_pixels(),
    ],
)
def test_every_guidance_takes_the_taps_and_makes_them_once(derive, monkeypatch):
    launches, own = [], module.batch_norm_tap
    monkeypatch.setattr(module, "batch_norm_tap", lambda *given: launches.append(given) or own(*given))
    prior, teacher = SmallPrior(), classifier()
    prior.scaling_factor, prior.decoder_input, prior.decode_input = 1.0, NetworkInput(), prior.decode
    z = torch.zeros(2, 2, 4, 4)
    for kernels, wanted in (("torch", 0), ("triton", 3)):
        guidance = Guidance(prior.decode, teacher, LossWeights(0.3, 0.7), kernels=kernels)
        made = derive(guidance, prior)
        assert made.taps is guidance.taps
        made.gradient(z if made.decode is not identity else prior.decode(z), LABELS[:2], 2)
        assert len(launches) == wanted


class Little(nn.Module):
    """A convolution and a BatchNorm, and what a function makes of them and the network."""

    def __init__(self, rest, norm=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), norm or nn.BatchNorm2d(4)
        self.active, self.in_place, self.last = nn.ReLU(), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 1)
        self.rest = rest

    def forward(self, x):
        return self.last(self.rest(self, self.first(x))).mean((2, 3))


def decides_by_a_value(net, x):
    y = net.norm(x)
    return F.relu(y) if y.sum() > -1e9 else y


def added(net, x):
    y = net.norm(x)
    return net.active(y + net.active(x))


def read_twice(net, x):
    y = net.norm(x)
    return F.relu(y) + y


class WithSwish(nn.BatchNorm2d):
    """A layer with an activation of its own, as timm has them."""

    def forward(self, x):
        return F.silu(super().forward(x))


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's: buffers alone, and no number of features."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(4, generator=torch.Generator().manual_seed(len(name))) + 0.2)

    def forward(self, x):
        w, b, mean, variance = (v[None, :, None, None] for v in (self.weight, self.bias, self.running_mean,
                                                                  self.running_var))  # fmt: skip
        return (x - mean) * w * (variance + self.eps).rsqrt() + b


def compare(network, native, fused, traced=True):
    """Logits, moments and the gradient of all of them, with taps and with hooks."""
    teacher = teacher_of(network, 5)
    layers = teacher.batch_norms()
    assert len(layers) == 1
    taps = Taps.of(network, layers)
    assert (taps.taps[0].native, taps.taps[0].relu, taps.graph is not None) == (native, fused, traced), taps.why

    def hooked(x):
        with tapped(layers) as moments:
            logits = network(x)
        return logits, moments

    found = []
    for way in (taps, hooked):
        leaf = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(3), dtype=F64).requires_grad_()
        logits, (moments,) = way(leaf)
        loss = logits.square().sum() + moments.m1.sum() + moments.m2.square().sum()
        found.append((logits, moments.m1, moments.m2, *torch.autograd.grad(loss, leaf)))
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, **EXACT)
    assert "forward" not in vars(layers[0]) and not layers[0]._forward_pre_hooks
    return taps


@pytest.mark.parametrize(
    "rest, fused",
    [
        (lambda net, x: F.relu(net.norm(x)), True),
        (lambda net, x: torch.relu(net.norm(x)), True),
        (lambda net, x: net.norm(x).relu_(), True),
        (lambda net, x: F.relu(input=net.norm(x), inplace=True), True),
        (lambda net, x: net.active(net.norm(net.active(x))), True),  # a module that is used elsewhere too
        (lambda net, x: net.in_place(net.norm(x)), True),
        (lambda net, x: F.relu6(net.norm(x)), False),
        (lambda net, x: net.norm(x), False),
        (lambda net, x: F.relu(net.norm(x) + 1), False),
        (added, False),
        (read_twice, False),
    ],
)
def test_a_relu_is_taken_only_where_nothing_else_reads_the_layer(rest, fused):
    network = trained(Little(rest), 5).double()
    compare(network, True, fused)


@pytest.mark.parametrize(
    "norm, native",
    [
        (nn.BatchNorm2d(4, affine=False), True),
        (nn.BatchNorm2d(4, eps=0.1, momentum=None), True),
        (nn.SyncBatchNorm(4), True),
        (FrozenBatchNorm2d(), True),
        (WithSwish(4), False),
    ],
)
def test_every_kind_of_layer(norm, native):
    network = Little(lambda net, x: F.relu(net.norm(x)), norm).eval().requires_grad_(False).double()
    compare(network, native, native)
    compare(network.to(memory_format=torch.channels_last), native, native)


def test_a_network_that_fx_cannot_follow_keeps_its_layers_alone():
    taps = compare(trained(Little(decides_by_a_value), 5).double(), True, False, traced=False)
    assert taps.in_words().startswith("1 of 1 BatchNorm layers with their moments in a launch, 0 with their ReLU (fx ")
    hooked = trained(Little(lambda net, x: F.relu(net.norm(x))), 5).double()
    hooked.register_forward_hook(lambda network, x, y: 2 * y)
    assert "hooks" in compare(hooked, True, False, traced=False).why


def test_layers_are_as_they_were_when_a_pass_fails():
    network = trained(Little(decides_by_a_value), 5)
    with pytest.raises(RuntimeError):
        Taps.of(network, (network.norm,))(torch.zeros(1, 2, 5, 5))
    assert "forward" not in vars(network.norm)


@pytest.mark.parametrize("decides", [False, True])
@pytest.mark.parametrize("times", [0, 2])
def test_a_layer_has_to_be_used_once(times, decides):
    def rest(net, x):
        if decides and x.sum() > 1e9:
            return x
        for _ in range(times):
            x = net.norm(x)
        return x

    network = Little(rest).eval().requires_grad_(False)
    with pytest.raises(ValueError, match=f"layer 0 was used {times} times"):
        Taps.of(network, (network.norm,))(torch.zeros(1, 3, 5, 5))
    network.train()
    with pytest.raises(ValueError, match=r"layer 0 is in training mode: call eval\(\)"):
        Taps.of(network, (network.norm,))


def test_weights_are_read_where_they_are():
    """Of a teacher that loads a checkpoint afterwards, say."""
    teacher = classifier(dtype=F64)
    layers = teacher.batch_norms()
    taps = Taps.of(teacher.module, layers)
    x = torch.rand(2, 3, 8, 8, dtype=F64)
    before = taps(x)[0]
    for layer in layers:
        layer.weight.mul_(2)
        layer.running_mean.add_(1)
    after = taps(x)[0]
    torch.testing.assert_close(after, teacher.module(x), **EXACT)
    assert not torch.allclose(before, after)


def graphs_of(guidance, z, group=None):
    """The forward and the backward graph that torch.compile makes of a guidance loss, their operations by name.

    Without a break, and with the gradient of the loss as it runs by itself.
    """

    def loss(latents, labels):
        return guidance._losses(latents, labels, group)[0].sum()

    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend), fullgraph=True)
    found, wanted = (gradient_of(partial(way, labels=LABELS), z)[1] for way in (compiled, loss))
    torch._dynamo.reset()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    return graphs


@pytest.mark.parametrize("stats", ["image", "group"])
def test_the_compiler_takes_the_guidance_gradient_for_one_graph(stats):
    """Decoder, teacher with taps, CE, L_bn and the adversarial loss's own kernel."""
    prior, teacher, student = SmallPrior(), classifier(), classifier(seed=9, norm=False)
    weights = LossWeights(0.3, 0.7, 1.0, bn_stats=stats)
    guidance = Guidance(prior.decode, teacher, weights, student, kernels="triton")
    z = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    group = guidance._group_loss(z, None, 5) if stats == "group" else None
    forward, backward = graphs_of(guidance, z, group)
    assert forward.count("dfkd.batch_norm_tap.default") == 3 and forward.count("dfkd.soft_kl.default") == 1
    assert backward.count("dfkd.batch_norm_tap_gradient.default") == 3


def test_a_decoder_with_the_kernels_group_norms_is_in_that_graph_too(tmp_path):
    """diffusers' own AutoencoderKL: every group norm of it by the kernel, beside the teacher's taps."""
    prior = load_prior(make_small_sd(tmp_path))
    norms = set_group_norms(prior.vae, "triton")
    assert norms.fused == norms.layers and norms.with_silu
    decoded = sum(isinstance(layer, nn.GroupNorm) for layer in prior.vae.decoder.modules())
    guidance = Guidance(prior.decode, classifier(), LossWeights(0.3, 0.7, bn_stats="image"), kernels="triton")
    z = torch.randn(5, prior.latent_channels, *prior.latent_size, generator=torch.Generator().manual_seed(5))
    forward, backward = graphs_of(guidance, z)
    assert forward.count("dfkd.group_norm_silu.default") == decoded
    assert backward.count("dfkd.group_norm_silu_backward.default") == decoded
    assert forward.count("dfkd.batch_norm_tap.default") == backward.count("dfkd.batch_norm_tap_gradient.default") == 3
