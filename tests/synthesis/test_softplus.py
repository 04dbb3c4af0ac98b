"""A teacher whose gradient passes its ReLUs as those of softplus, however it calls them."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfkd.errors import UsageError
from dfkd.synthesis.guidance import Guidance, identity
from dfkd.synthesis.losses import BatchNormLoss, CrossEntropy
from dfkd.synthesis.softplus import softened
from dfkd.teachers import Classifier
from tests.synthesis.small_networks import CLASS_NAMES, classifier, pipeline

F64, BETA, SIDE = torch.float64, 3.0, 8
INTERPRETED = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernel is not interpreted")


class Net(nn.Module):
    """Convolution, batch norm, an activation that is called in one of several ways, and a linear layer."""

    def __init__(self, relu):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.relu, self.last = relu, nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.relu(self.norm(self.first(x))).mean((2, 3)))


RELUS = {
    "module": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "functional": F.relu,
    "torch": torch.relu,
    "method": lambda x: x.relu(),
}


def teacher(relu, dtype=F64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net(relu).eval().requires_grad_(False).to(dtype)
    return Classifier(net, CLASS_NAMES, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), SIDE, "net")


def images(dtype=F64):
    return torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=dtype)


LABELS = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("how", RELUS)
@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=INTERPRETED)])
def test_values_are_the_teachers_and_slopes_softpluss(how, kernels):
    """By hand: dL/dx of a ReLU is sigmoid(beta x), its value as it is."""
    own, x = teacher(RELUS[how]), images()
    losses = (CrossEntropy(1.0), BatchNormLoss(0.1, "group"))
    soft = Guidance(identity, softened(own, BETA), losses, kernels=kernels)
    plain = Guidance(identity, own, losses)
    (gradient, record), (other, values) = (g.gradient(x, LABELS, 4) for g in (soft, plain))
    for name in values:
        torch.testing.assert_close(record[name], values[name], rtol=1e-9, atol=1e-9)
    assert (gradient - other).abs().max() > 1e-3 * other.abs().max()

    def relu(y):
        return y.clamp_min(0).detach() + F.softplus(y, BETA, 1e9) - F.softplus(y, BETA, 1e9).detach()

    expected, _ = Guidance(identity, teacher(relu), losses).gradient(x, LABELS, 4)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


def test_a_large_beta_is_the_relu():
    own, x = teacher(F.relu), images()
    soft, plain = (Guidance(identity, t, (CrossEntropy(1.0),)) for t in (softened(own, 1e9), own))
    torch.testing.assert_close(soft.gradient(x, LABELS, 4)[0], plain.gradient(x, LABELS, 4)[0], rtol=1e-6, atol=1e-9)
    assert softened(own, 0.0) is own


def test_refusals():
    with pytest.raises(UsageError, match="--softplus-beta 3 with the teacher small: it has no ReLU"):
        pipeline(softplus_beta=3.0)

    def forgetful(x):
        F.relu_(x)
        return x

    with pytest.raises(UsageError, match="changes its input in place, and its result is not used"):
        softened(teacher(forgetful), BETA)


def test_it_guides_and_nothing_else_changes():
    """The record's probability is the teacher's own."""
    own = teacher(nn.ReLU(), torch.float32)
    plain, soft = (pipeline(teacher=own, softplus_beta=beta) for beta in (0.0, BETA))
    a, b = (pipe(range(7), seed=1) for pipe in (plain, soft))
    assert not torch.equal(a.images, b.images) and soft.teacher is own
    sure = own.logits(b.images / 255).softmax(1).gather(1, b.labels[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([r.teacher_probability for r in b.records]), sure, rtol=1e-4, atol=1e-5)
    assert classifier().batch_norms()
