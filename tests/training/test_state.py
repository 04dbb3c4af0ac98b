"""One step of SGD: clipping, the scale of fp16 and what a skipped step leaves alone, the average; the learning rate."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd import teachers
from dfkd.config import OptimiserConfig, TrainConfig
from dfkd.training.state import State, learning_rate, parameter_groups

CPU = torch.device("cpu")
OVERFLOWS = 1e36  # times the scale of 65536 more than float32 holds, while the loss itself is a number
PUBLISHED = ("150/240", "180/240", "210/240")


def state(**changes: Any) -> State:
    torch.manual_seed(0)
    return State(nn.Linear(4, 3), TrainConfig.of(steps=12).replace(**changes), CPU)


def step(own: State, factor: float = 1.0) -> None:
    own.set_rate(0.1)
    own.descend(factor * own.network(torch.ones(2, 4)).square().sum())
    own.advance()


def weights(own: State) -> Tensor:
    return torch.cat([p.detach().flatten() for p in own.network.parameters()])


def averaged(own: State) -> Tensor:
    return torch.cat([p.detach().flatten() for p in own.result.parameters()])


def test_a_clipped_gradient_has_the_norm_asked_and_its_direction() -> None:
    free, clipped = state(momentum=0.0, weight_decay=0.0), state(momentum=0.0, weight_decay=0.0, clip_norm=0.5)
    before = weights(free)
    step(free)
    step(clipped)
    moved, short = before - weights(free), before - weights(clipped)
    assert moved.norm() > 0.1  # more than what is allowed
    torch.testing.assert_close(short, moved * (0.05 / moved.norm()), rtol=1e-4, atol=1e-7)  # lr times the norm
    assert clipped.measured()["gradient_norm"] == pytest.approx(float(moved.norm()) / 0.1, rel=1e-4)
    assert free.measured() == {}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_that_overflows_is_skipped_and_counted(momentum: float) -> None:
    own = state(amp="fp16", ema=0.9, momentum=momentum, clip_norm=1.0)
    before = weights(own)
    step(own, OVERFLOWS)
    assert torch.equal(weights(own), before)
    assert own.measured()["skipped"] == 1 and own.measured()["loss_scale"] == 2.0**15
    assert own.step == 1  # its images were shown: the learning rate goes on with the data
    step(own)
    assert not torch.equal(weights(own), before) and weights(own).isfinite().all()
    assert own.measured()["skipped"] == 1


def test_the_scaled_step_is_the_plain_one() -> None:
    """A power of two rounds nothing."""
    scaled, plain = state(amp="fp16"), state()
    for _ in range(3):
        step(scaled)
        step(plain)
    assert torch.equal(weights(scaled), weights(plain))


def test_the_average_is_its_definition_and_takes_no_skipped_step() -> None:
    """Four skipped steps on the way leave the average of a run without them, ramp included."""
    plain, skipping = state(ema=0.5, momentum=0.0), state(ema=0.5, momentum=0.0, amp="fp16")
    wanted = weights(plain).clone()
    for n in range(1, 9):
        step(plain)
        if n % 2:
            step(skipping, OVERFLOWS)
        step(skipping)
        decay = min(0.5, (1 + n) / (10 + n))
        wanted = decay * wanted + (1 - decay) * weights(plain)
    torch.testing.assert_close(averaged(plain), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(averaged(skipping), averaged(plain)) and skipping.measured()["skipped"] == 4


SAVED: list[dict[str, Any]] = [{}, {"amp": "fp16", "ema": 0.9}, {"momentum": 0.0}, {"decay": "weights"}]
SAVED += [{"optimiser": "adamw"}, {"optimiser": "adamw", "amp": "fp16", "ema": 0.9}]


@pytest.mark.parametrize("changes", SAVED)
def test_a_state_that_was_saved_goes_on_alike(changes: dict[str, Any]) -> None:
    own = state(**changes)
    for factor in (1.0, OVERFLOWS if "amp" in changes else 1.0):
        step(own, factor)
    other = state(**changes)
    with torch.no_grad():
        other.network.weight.zero_()  # type: ignore[operator, union-attr]
    other.load(own.content())
    for each in (own, other):
        step(each)
    assert torch.equal(weights(own), weights(other)) and own.measured() == other.measured()
    assert torch.equal(averaged(own), averaged(other))


def test_adamw_takes_its_settings() -> None:
    """The first step of Adam is the rate in the direction of each gradient's sign, decayed apart from it."""
    own = state(optimiser="adamw", weight_decay=0.5, decay="all", momentum=0.8, beta2=0.9)
    before = weights(own)
    step(own)
    moved = weights(own) - before * (1 - 0.1 * 0.5)
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.1), rtol=1e-4, atol=0)
    assert own.optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_what_is_frozen_is_neither_saved_nor_copied() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3))
    own = State(network, TrainConfig.of(steps=12, ema=0.5), CPU)
    assert own.content()["network"].keys() == own.content()["average"].keys() == {"1.weight", "1.bias"}
    assert own.result[0].weight is network[0].weight and own.result[1].weight is not network[1].weight  # type: ignore[index]
    step(own)
    other = State(copy.deepcopy(network), TrainConfig.of(steps=12, ema=0.5), CPU)
    other.load(own.content())
    assert torch.equal(weights(own), weights(other)) and torch.equal(averaged(own), averaged(other))


def test_weight_decay_spares_biases_and_norms_where_asked() -> None:
    network = teachers.build("resnet8", 2)
    decayed, spared = parameter_groups(network, OptimiserConfig(decay="weights", weight_decay=0.1))
    assert {weight.ndim for weight in decayed["params"]} == {2, 4} and decayed["weight_decay"] == 0.1
    assert {weight.ndim for weight in spared["params"]} == {1} and spared["weight_decay"] == 0
    (everything,) = parameter_groups(network, OptimiserConfig(decay="all"))
    assert len(everything["params"]) == len(decayed["params"]) + len(spared["params"])


def rates(count: int, **changes: Any) -> list[float]:
    return [learning_rate(step, count, OptimiserConfig(**changes)) for step in range(count)]


def test_multistep_drops_at_the_published_epochs() -> None:
    found = rates(240, lr=0.2, schedule="multistep", milestones=PUBLISHED)
    for first, last, rate in ((0, 149, 0.2), (150, 179, 0.02), (180, 209, 2e-3), (210, 239, 2e-4)):
        assert found[first] == pytest.approx(rate) and found[last] == pytest.approx(rate)


def test_a_factor_of_ones_own_and_a_rate_that_stays() -> None:
    """Fast-Datafree's teachers: x 0.2 after 120, 150 and 180 of 200 epochs; DomainNet's keep theirs."""
    own = {"milestones": ("120/200", "150/200", "180/200"), "gamma": 0.2}
    found = rates(200, lr=0.1, schedule="multistep", **own)
    for epoch, rate in ((119, 0.1), (120, 0.02), (150, 0.004), (199, 8e-4)):
        assert found[epoch] == pytest.approx(rate)
    assert set(rates(120, lr=0.01, schedule="constant")) == {0.01}


def test_a_trapezoid_is_flat_and_falls_straight() -> None:
    found = rates(100, lr=0.1, schedule="trapezoid", warmup=4)
    assert found[:4] == pytest.approx([0.02, 0.04, 0.06, 0.08]) and set(found[4:60]) == {0.1}
    assert found[80] == pytest.approx(0.05) and found[99] == pytest.approx(0.0025)


def test_cosine_and_onecycle_end_at_nearly_nothing() -> None:
    found = rates(100, lr=1.0, schedule="cosine")
    assert found[0] == 1 and found[50] == pytest.approx(0.5) and found == sorted(found, reverse=True)
    cycle = rates(1000, lr=1.0, schedule="onecycle")
    assert cycle[0] == pytest.approx(0.04) and max(cycle) == cycle[300] == pytest.approx(1)
    assert cycle[:301] == sorted(cycle[:301]) and cycle[300:] == sorted(cycle[300:], reverse=True)
    assert 0 < found[-1] < 1e-3 and 0 < cycle[-1] < 1e-5


@pytest.mark.parametrize("kind", ["multistep", "cosine", "constant"])
def test_warm_up_rises_linearly_to_the_peak(kind: str) -> None:
    assert rates(100, lr=1.0, schedule=kind, warmup=4)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(map(math.isfinite, rates(4, lr=1.0, schedule=kind, warmup=10)))  # a run shorter than its warm-up
