"""BN statistics against their definition, recorded by hooks and by the kernel; which ReLU goes into a launch."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfkd.errors import UsageError
from dfkd.synthesis.bn_statistics import (
    FusedTeacher,
    Moments,
    averaged,
    averaged_over,
    bn_distance,
    by_layer,
    moments_about,
    moments_together,
    record_bn_inputs,
    side_by_side,
)
from dfkd.synthesis.guidance import Guidance, identity
from dfkd.synthesis.losses import BatchNormLoss, GuidanceLoss, Seen
from dfkd.teachers import Classifier, build
from tests.synthesis.small_networks import bn_inputs, classifier, plain_bn_loss

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-9}
DISTANCES = ("norm", "relative")
# The kernel runs in Triton's interpreter here; natively in tests/kernels.
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernel is not interpreted")


@pytest.fixture
def teacher():
    return classifier(dtype=F64)


def images(count, size=8):
    return torch.rand(count, 3, size, size, dtype=F64, generator=torch.Generator().manual_seed(3))


def moments_of(teacher, x):
    with record_bn_inputs(teacher.batch_norms()) as moments:
        teacher.logits(x)
    return moments


@pytest.mark.parametrize("size", [8, 5, 12])
@pytest.mark.parametrize("distance", DISTANCES)
def test_distance_of_every_image_is_its_definition(teacher, distance, size):
    x = images(5, size)
    got = bn_distance(moments_of(teacher, x), teacher.batch_norms(), distance)
    expected = [plain_bn_loss(bn_inputs(teacher, x[i : i + 1])[1], distance) for i in range(5)]
    torch.testing.assert_close(got, torch.stack(expected), **EXACT)


@pytest.mark.parametrize("name", ["resnet18", "resnet8", "shufflenetv2"])
def test_a_layer_meets_its_own_running_statistics(name):
    """Shortcut layers are defined before and called after the branch: pairing by calling order would swap them."""
    module = build(name, 3).eval()
    layers = tuple(m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    found = {}
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, x: found.__setitem__(layer, x[0]))
    with torch.no_grad(), record_bn_inputs(layers) as moments:
        module(torch.rand(2, 3, 32, 32))
    for layer, taken in zip(layers, moments, strict=True):
        torch.testing.assert_close(taken.m1 + layer.running_mean, found[layer].mean((2, 3)))


@pytest.mark.parametrize("times", [0, 2])
def test_a_layer_has_to_be_used_once(times):
    layer = nn.BatchNorm2d(3).eval()
    with pytest.raises(UsageError, match=f"layer 0 was used {times} times"), record_bn_inputs((layer,)):
        for _ in range(times):
            layer(torch.rand(1, 3, 2, 2))


def test_hooks_go_when_the_pass_fails(teacher):
    with pytest.raises(RuntimeError), record_bn_inputs(teacher.batch_norms()):
        teacher.module(torch.zeros(1, 2, 8, 8, dtype=F64))
    assert not any(layer._forward_pre_hooks for layer in teacher.batch_norms())


def test_half_precision_features_are_averaged_in_float32():
    layer = nn.BatchNorm2d(2).eval().to(torch.bfloat16)
    x = (100 + torch.randn(1, 2, 32, 32, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    with record_bn_inputs((layer,)) as moments:
        layer(x)
    assert moments[0].m1.dtype == torch.float32
    # a mean of 1024 values near 100 summed in bfloat16 would be off by units; float32 leaves 1e-5
    torch.testing.assert_close(moments[0].m1, x.double().mean((2, 3)).float(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_perfect_match_has_a_finite_gradient(distance):
    layer = nn.BatchNorm2d(4).double()
    x = torch.zeros(1, 4, dtype=F64).requires_grad_(), torch.ones(1, 4, dtype=F64).requires_grad_()
    seen = Seen(torch.zeros(1), torch.zeros(1, 2), torch.zeros(1), [Moments(*x)], (layer,))
    value = BatchNormLoss(1.0, "group", distance)(seen)
    assert abs(value) < 1e-5
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value.sum(), x))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_gradient_of_moments_is_autograds_own(layout):
    """Bit for bit, in the strides of the map."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 7, 6, generator=random).to(memory_format=layout).requires_grad_()
    mean, given = torch.randn(5, generator=random), torch.randn(2, 3, 5, generator=random)
    found, d = moments_about(x, mean), x - mean[None, :, None, None]
    wanted = d.mean((2, 3)), d.square().mean((2, 3))
    assert all(map(torch.equal, found, wanted))
    (got,), (want,) = (torch.autograd.grad(of, x, tuple(given)) for of in (found, wanted))
    assert torch.equal(got, want) and got.stride() == x.stride()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 6), (9, 16, 32, 32)])
def test_moments_together_are_the_average_of_every_images(shape, dtype, layout):
    """Also of half precision, to the digits of a sum in float32, and with the gradient of the average."""
    random = torch.Generator().manual_seed(0)
    x = (2 + torch.randn(shape, generator=random)).to(dtype).to(memory_format=layout).requires_grad_()
    layer = nn.BatchNorm2d(shape[1]).eval().requires_grad_(False)
    layer.running_mean = torch.randn(shape[1], generator=random)
    layer = layer.double() if dtype == F64 else layer
    exact = x.detach().double().requires_grad_()
    found, (wanted,) = moments_together(x, layer), averaged([moments_about(exact, layer.running_mean.double())])
    given = torch.randn(2, 1, shape[1], generator=random)
    # one after another n values of a size are added, whose roundings make a random walk of sqrt(n) steps of eps / 2
    kind, count = found.m1.dtype, x.numel() / shape[1]
    error = 4 * torch.finfo(kind).eps * count**0.5
    assert kind == (F64 if dtype == F64 else torch.float32)
    for own, exactly in zip(found, wanted, strict=True):
        torch.testing.assert_close(own.double(), exactly, rtol=error, atol=error)
    (got,) = torch.autograd.grad(found, x, tuple(given.to(kind)))
    (want,) = torch.autograd.grad(tuple(wanted), exact, tuple(given.double()))
    assert got.dtype == dtype and got.stride() == x.stride()
    rounded = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(kind).eps * want.abs().max().item()}
    torch.testing.assert_close(got.double(), want, **rounded)


def test_averages_over_calls_of_any_size(teacher):
    x, layers = images(7), teacher.batch_norms()
    wanted = averaged(moments_of(teacher, x))
    parts = []
    for together, cut in ((True, slice(0, 3)), (False, slice(3, 6)), (True, slice(6, 7))):
        with record_bn_inputs(layers, together) as moments:
            teacher.logits(x[cut])
        assert [len(m.m1) for m in moments] == [1 if together else 3] * len(layers)
        parts.append(moments)
    for found, expected in zip(averaged_over(parts, [3, 3, 1]), wanted, strict=True):
        torch.testing.assert_close(tuple(found), tuple(expected), **EXACT)


class EveryImages(GuidanceLoss):
    """A loss of one's own that goes by the moments of every image."""

    needs = frozenset({"moments"})

    def __call__(self, seen):
        return seen.moments[0].m2.sum(1)


@pytest.mark.parametrize("own, rows", [((), 1), ((EveryImages(1.0),), 4)])
def test_moments_of_every_image_are_formed_where_a_loss_asks_for_them(teacher, own, rows):
    guidance = Guidance(identity, teacher, (BatchNormLoss(1.0, "group"), *own))
    assert {len(m) for moments in guidance.judge(images(4))[1] for m in moments} == {rows}


def test_moments_side_by_side_and_back(teacher):
    moments = moments_of(teacher, images(3))
    m1, m2 = side_by_side(moments)
    assert m1.shape == m2.shape == (3, 20)  # layers of 6, 7 and 7 channels
    for back, there in zip(by_layer(teacher.batch_norms(), m1, m2), moments, strict=True):
        assert torch.equal(back.m1, there.m1) and torch.equal(back.m2, there.m2)


def trained(module, size=32):
    """Frozen, with the running statistics of images that are not those of a test, as after training."""
    module.train()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # averages
    with torch.no_grad():
        module(torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(1)))
    return module.eval().requires_grad_(False)


def teacher_of(module, size=32):
    return Classifier(module, ("a", "b", "c"), (0.5, 0.4, 0.6), (0.2, 0.3, 0.25), size, "own")


@pytest.mark.parametrize("name, relus", [("resnet8", 4), ("wrn16_1", 13), ("vgg8", 5), ("mobilenetv2", 0)])
def test_layers_and_relus_that_the_kernel_takes(name, relus):
    module = build(name, 3).eval()
    layers = teacher_of(module).batch_norms()
    fused, count = FusedTeacher.of(module, layers), len(layers)
    assert fused.graph is not None and sum(layer.relu for layer in fused.recording) == relus
    wanted = f"{count} of {count} BatchNorm layers with their moments in a launch, {relus} with their ReLU"
    assert fused.describe() == wanted


@interpreted
def test_a_teacher_by_the_kernel_has_the_loss_and_gradient_of_hooks():
    torch.manual_seed(0)
    teacher = teacher_of(trained(build("resnet8", 3)))
    exact = teacher.replace(module=copy.deepcopy(teacher.module).double())
    x, labels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)), torch.zeros(2, dtype=torch.int64)
    loss = (BatchNormLoss(1.0, "group", "relative"),)
    gradient, losses = Guidance(identity, teacher, loss, kernels="triton").of_call(x, labels)
    wanted, expected = Guidance(identity, exact, loss).of_call(x.double(), labels)
    torch.testing.assert_close(losses["bn"].double(), expected["bn"], rtol=1e-5, atol=0)
    assert (gradient.double() - wanted).norm() < 1e-5 * wanted.norm()  # float32


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
    """torchvision's by name and tensors: buffers alone, and no number of features."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(4, generator=torch.Generator().manual_seed(len(name))) + 0.2)

    def forward(self, x):
        w, b, mean, variance = (v[None, :, None, None] for v in (self.weight, self.bias, self.running_mean,
                                                                  self.running_var))  # fmt: skip
        return (x - mean) * w * (variance + self.eps).rsqrt() + b


def compare(network, kernel, relu, traced=True):
    """Logits, moments and the gradient of all of them, by a FusedTeacher and by hooks."""
    layers = teacher_of(network, 5).batch_norms()
    assert len(layers) == 1
    fused = FusedTeacher.of(network, layers)
    (own,) = fused.recording
    assert (own.fused, own.relu, fused.graph is not None) == (kernel, relu, traced), fused.why

    def hooked(x):
        with record_bn_inputs(layers) as moments:
            logits = network(x)
        return logits, moments

    found = []
    for way in (fused, hooked):
        leaf = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(3), dtype=F64).requires_grad_()
        logits, (moments,) = way(leaf)
        loss = logits.square().sum() + moments.m1.sum() + moments.m2.square().sum()
        found.append((logits, moments.m1, moments.m2, *torch.autograd.grad(loss, leaf)))
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, **EXACT)
    assert "forward" not in vars(layers[0]) and not layers[0]._forward_pre_hooks
    return fused


@interpreted
@pytest.mark.parametrize(
    "rest, relu",
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
def test_a_relu_is_taken_only_where_nothing_else_reads_the_layer(rest, relu):
    compare(trained(Little(rest), 5).double(), True, relu)


@interpreted
@pytest.mark.parametrize(
    "norm, kernel",
    [
        (nn.BatchNorm2d(4, affine=False), True),
        (nn.BatchNorm2d(4, eps=0.1, momentum=None), True),
        (nn.SyncBatchNorm(4), True),
        (FrozenBatchNorm2d(), True),
        (WithSwish(4), False),
    ],
)
def test_every_kind_of_layer(norm, kernel):
    network = Little(lambda net, x: F.relu(net.norm(x)), norm).eval().requires_grad_(False).double()
    compare(network, kernel, kernel)
    compare(network.to(memory_format=torch.channels_last), kernel, kernel)


@interpreted
def test_a_network_that_fx_cannot_follow_keeps_its_layers_alone():
    fused = compare(trained(Little(decides_by_a_value), 5).double(), True, False, traced=False)
    assert "0 with their ReLU (fx cannot follow the teacher" in fused.describe()
    hooked = trained(Little(lambda net, x: F.relu(net.norm(x))), 5).double()
    hooked.register_forward_hook(lambda network, x, y: 2 * y)
    assert "hooks" in compare(hooked, True, False, traced=False).why


def test_layers_are_as_they_were_when_a_pass_fails():
    network = trained(Little(decides_by_a_value), 5)
    with pytest.raises(RuntimeError):
        FusedTeacher.of(network, (network.norm,))(torch.zeros(1, 2, 5, 5))
    assert "forward" not in vars(network.norm)


@pytest.mark.parametrize("decides", [False, True])
@pytest.mark.parametrize("times", [0, 2])
def test_a_fused_layer_has_to_be_used_once(times, decides):
    def rest(net, x):
        if decides and x.sum() > 1e9:
            return x
        for _ in range(times):
            x = net.norm(x)
        return x

    network = Little(rest, WithSwish(4)).eval().requires_grad_(False)  # a layer that needs no kernel
    with pytest.raises(UsageError, match=f"layer 0 was used {times} times"):
        FusedTeacher.of(network, (network.norm,))(torch.zeros(1, 3, 5, 5))
    network.train()
    with pytest.raises(UsageError, match=r"layer 0 is in training mode: .*call eval\(\)"):
        FusedTeacher.of(network, (network.norm,))


@interpreted
def test_weights_are_read_where_they_are(teacher):
    """A teacher that loads a checkpoint afterwards needs no new FusedTeacher."""
    layers = teacher.batch_norms()
    fused, x = FusedTeacher.of(teacher.module, layers), images(2)
    before = fused(x)[0]
    for layer in layers:
        layer.weight.mul_(2)
        layer.running_mean.add_(1)
    after = fused(x)[0]
    torch.testing.assert_close(after, teacher.module(x), **EXACT)
    assert not torch.allclose(before, after)


@interpreted
def test_the_compiler_takes_the_guidance_gradient_for_one_graph():
    """torch.compile of teacher, moments and loss of a group makes one graph without a break, with the same gradient."""
    from torch._dynamo.backends.common import aot_autograd

    guidance = Guidance(identity, classifier(), (BatchNormLoss(0.3, "image"),), kernels="triton")
    graphs, labels = [], torch.zeros(3, dtype=torch.int64)

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    def loss(x):
        return guidance.values(x, labels)["bn"].sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend), fullgraph=True)
    leaf = images(3).float().requires_grad_()
    found, wanted = (torch.autograd.grad(way(leaf), leaf)[0] for way in (compiled, loss))
    torch._dynamo.reset()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    assert [sum(name.startswith("dfkd.bn_moments") for name in graph) for graph in graphs] == [3, 3]
