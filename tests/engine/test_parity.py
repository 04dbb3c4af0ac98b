"""Parity tells a wrong engine from a right one, per sample, and sets kinks apart without asking the engine."""

import math

import pytest
import torch
from torch import nn

from dfkd_engine.errors import EngineError
from dfkd_engine.parity import TOLERANCE, Parity, measure

GRADIENT = TOLERANCE["gradient", "float32"]
BATCHES = [4, 3]


def gradient_of(module):
    """(x [B, 6]) -> gradient [B, 6] and loss [B] of a small network."""

    def run(x):
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            loss = module(leaf).square().sum(1)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return gradient, loss.detach()

    return run


@pytest.fixture(scope="module")
def networks():
    """The gradient in float32 and in float64 of one network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 3)).requires_grad_(False)
    exact = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 3)).requires_grad_(False)
    exact.load_state_dict(module.state_dict())
    return gradient_of(module), gradient_of(exact.double())


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(rows, 6, generator=generator),) for rows in BATCHES]


def test_a_right_engine_passes(networks):
    eager, exact = networks
    parity = measure(eager, exact, eager, batches(), "gradient")
    assert parity.samples == 7 and parity.kinks == 0 and parity.problem(GRADIENT) is None
    assert 0 < parity.relative < 1e-5 and parity.cosine > 1 - 1e-9
    assert set(parity.to_json()) == {"relative", "cosine", "samples", "kinks"}


def test_a_thousandth_too_long_is_caught(networks):
    eager, exact = networks
    parity = measure(lambda x: (eager(x)[0] * 1.001, eager(x)[1]), exact, eager, batches(), "gradient")
    assert parity.relative == pytest.approx(1e-3, rel=0.01) and parity.cosine > 0.9999  # direction alone would pass
    assert "relative error is 1.0e-03, allowed is 1e-04" in parity.problem(GRADIENT)
    wrong_loss = measure(lambda x: (eager(x)[0], eager(x)[1] * 1.01), exact, eager, batches(), "gradient")
    assert wrong_loss.problem(GRADIENT) is not None
    turned = Parity(relative=0.0, cosine=0.99, samples=3, kinks=0)
    assert "cosine is 0.990000, wanted is 0.9999 or more" in turned.problem(GRADIENT)


def test_one_wrong_sample_of_many_is_caught(networks):
    eager, exact = networks

    def one_off(x):
        gradient, loss = eager(x)
        gradient[-1] = gradient[0]
        return gradient, loss

    assert measure(one_off, exact, eager, batches(), "gradient").problem(GRADIENT) is not None


def test_a_loss_near_zero_is_judged_against_the_batch():
    """One number per sample: 1e-7 off is nothing beside a loss of 1, though it is all of a loss of 0."""
    exact = torch.tensor([1.0, 0.0, 1e-9], dtype=torch.float64)
    parity = measure(lambda x: (exact.float() + 1e-7,), lambda x: (exact,), None, [(torch.ones(3),)], "forward")
    assert parity.relative == pytest.approx(1e-7, rel=0.5)


def slope_of_absolute(x):
    """|x| summed over entries, differentiated: [B, 6] -> +1 or -1, which jumps at 0."""
    return (torch.where(x > 0, 1.0, -1.0),)


def rounded_slope(x):
    """`slope_of_absolute` by a program that rounds at the sixth decimal."""
    return slope_of_absolute(x.round(decimals=6))


def test_kinks_are_counted_and_set_apart():
    x = torch.linspace(-3, 3, 18).reshape(3, 6) + 0.1
    x[1, 2] = 2.0**-24
    parity = measure(rounded_slope, slope_of_absolute, rounded_slope, [(x,)], "gradient")
    assert (parity.samples, parity.kinks, parity.relative) == (2, 1, 0.0)
    # and what is wrong elsewhere is not excused by them
    wrong = measure(lambda y: (rounded_slope(y)[0] * 1.001,), slope_of_absolute, rounded_slope, [(x,)], "gradient")
    assert wrong.kinks == 1 and wrong.problem(GRADIENT) is not None


def test_a_kink_is_found_though_eager_itself_is_right_there():
    """The engine may land on the far side of a kink that eager is on the right side of: neither is wrong."""

    def step(x):
        """A derivative that jumps where the first two entries are equal, as a max-pooling window's."""
        first = (x[:, :1] >= x[:, 1:2]).to(x)
        return (torch.cat([first, 1 - first, torch.ones_like(x[:, 2:])], 1),)

    def rounded_otherwise(x):
        first = (x[:, :1] > x[:, 1:2]).to(x)
        return (torch.cat([first, 1 - first, torch.ones_like(x[:, 2:])], 1),)

    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    x[2, 0] = x[2, 1] = 0.7
    parity = measure(rounded_otherwise, step, step, [(x,)], "gradient")
    assert (parity.samples, parity.kinks, parity.relative) == (4, 1, 0.0)


def test_mostly_kinks_is_an_error(networks):
    eager, exact = networks
    poor = lambda x: (eager(x)[0] * 1.01, eager(x)[1])  # noqa: E731
    with pytest.raises(EngineError, match="eager itself misses 1e-04 at 7 of 7 samples"):
        measure(eager, exact, poor, batches(), "gradient")
    with pytest.raises(EngineError, match="0 of 0 samples"):
        measure(eager, exact, eager, [], "gradient")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_fails_even_on_a_kink(networks, bad):
    eager, exact = networks

    def broken(x):
        gradient, loss = eager(x)
        gradient[0, 0] = bad
        return gradient, loss

    def kink_at_the_first(x):
        gradient, loss = eager(x)
        gradient[0] = -gradient[0]
        return gradient, loss

    parity = measure(broken, exact, kink_at_the_first, batches(), "gradient")
    assert parity.kinks == 2 and parity.problem(GRADIENT) is not None


def test_forward_has_no_kinks():
    """A forward pass is continuous: there eager's errors excuse nothing."""
    x = torch.ones(2, 3)
    parity = measure(lambda x: (x * 1.001,), lambda x: (x,), lambda x: (x * 2,), [(x,)], "forward")
    assert parity.kinks == 0 and parity.problem(TOLERANCE["forward", "float32"]) is not None


def test_another_shape_is_an_error(networks):
    eager, exact = networks
    with pytest.raises(EngineError, match=r"it has shape \[4, 5\], the reference's is \[4, 6\]"):
        measure(lambda x: (eager(x)[0][:, :5], eager(x)[1]), exact, eager, batches(), "gradient")
