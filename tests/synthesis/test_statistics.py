"""BN statistics against their definition, and a group's against the whole batch, in float64."""

import pytest
import torch
from torch import nn

from dfkd.config import BN_LOSSES
from dfkd.synthesis.microbatch import cuts
from dfkd.synthesis.statistics import GroupLoss, Moments, add_moments, bn_loss, group_moments, tapped
from dfkd.teachers import build
from tests.synthesis.small_networks import bn_inputs, classifier, plain_bn_loss

EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture
def teacher():
    return classifier(dtype=torch.float64)


def images(count, size=8):
    return torch.rand(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def moments_of(teacher, x):
    with tapped(teacher.batch_norms()) as moments:
        teacher.logits(x)
    return moments


@pytest.mark.parametrize("size", [8, 5, 12])
@pytest.mark.parametrize("kind", BN_LOSSES)
def test_per_image_loss_is_its_definition(teacher, kind, size):
    x = images(5, size)
    got = bn_loss(moments_of(teacher, x), teacher.batch_norms(), kind)
    expected = [plain_bn_loss(bn_inputs(teacher, x[i : i + 1])[1], kind) for i in range(5)]
    torch.testing.assert_close(got, torch.stack(expected), **EXACT)


@pytest.mark.parametrize("count, micro", [(7, 7), (7, 3), (7, 1), (8, 4), (1, 1)])
@pytest.mark.parametrize("kind", BN_LOSSES)
def test_group_loss_and_gradient_are_those_of_the_whole_batch(teacher, kind, count, micro):
    x, layers = images(count), teacher.batch_norms()
    whole = x.clone().requires_grad_()
    expected = plain_bn_loss(bn_inputs(teacher, whole)[1], kind)
    (gradient,) = torch.autograd.grad(count * expected, whole)

    sums = []
    for rows, counted in cuts(count, micro):
        sums = add_moments(sums, moments_of(teacher, x[rows]), counted)
    group = GroupLoss.of(group_moments(sums, count), layers, kind)
    assert group.value == pytest.approx(expected.item(), rel=1e-9)
    parts = []
    for rows, counted in cuts(count, micro):
        leaf = x[rows].requires_grad_()
        (part,) = torch.autograd.grad(group.surrogate(moments_of(teacher, leaf)).sum(), leaf)
        parts.append(part[:counted])
    torch.testing.assert_close(torch.cat(parts), gradient, **EXACT)


@pytest.mark.parametrize("name", ["resnet18", "resnet8", "shufflenetv2"])
def test_a_layer_meets_its_own_running_statistics(name):
    """Shortcut layers are defined before and called after the branch: pairing by calling order would swap them."""
    module = build(name, 3).eval()
    layers = tuple(m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    found = {}
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, x: found.__setitem__(layer, x[0]))
    with torch.no_grad(), tapped(layers) as moments:
        module(torch.rand(2, 3, 32, 32))
    for layer, taken in zip(layers, moments, strict=True):
        torch.testing.assert_close(taken.m1 + layer.running_mean, found[layer].mean((2, 3)))


@pytest.mark.parametrize("times", [0, 2])
def test_a_layer_has_to_be_used_once(times):
    layer = nn.BatchNorm2d(3).eval()
    with pytest.raises(ValueError, match=f"layer 0 was used {times} times"), tapped((layer,)):
        for _ in range(times):
            layer(torch.rand(1, 3, 2, 2))


def test_hooks_go_when_the_pass_fails(teacher):
    with pytest.raises(RuntimeError), tapped(teacher.batch_norms()):
        teacher.module(torch.zeros(1, 2, 8, 8, dtype=torch.float64))
    assert not any(layer._forward_pre_hooks for layer in teacher.batch_norms())


def test_half_precision_features_are_averaged_in_float32():
    layer = nn.BatchNorm2d(2).eval().to(torch.bfloat16)
    x = (100 + torch.randn(1, 2, 32, 32, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    with tapped((layer,)) as moments:
        layer(x)
    assert moments[0].m1.dtype == torch.float32
    # a mean of 1024 values near 100 summed in bfloat16 would be off by units; float32 leaves 1e-5
    torch.testing.assert_close(moments[0].m1, x.double().mean((2, 3)).float(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("kind", BN_LOSSES)
def test_a_perfect_match_has_a_finite_gradient(kind):
    layer = nn.BatchNorm2d(4).double()
    m1, m2 = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    group = GroupLoss.of([Moments(m1, m2)], (layer,), kind)
    assert abs(group.value) < 1e-5
    assert all(t.isfinite().all() for slope in group.slopes for t in (slope.m1, slope.m2))
