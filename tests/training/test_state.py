"""One step of SGD: clipping, the scale of fp16 and what a skipped step leaves alone, the average of the weights."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dfkd.training.guard import HOPELESS, Guard
from dfkd.training.settings import DistillSettings
from dfkd.training.state import State
from dfkd.errors import UsageError
from dfkd.training.resume import read_checkpoint

CPU = torch.device("cpu")


def state(**changes: object) -> State:
    torch.manual_seed(0)
    return State(nn.Linear(4, 3), DistillSettings(lr=0.1, **changes), CPU)  # type: ignore[arg-type]


def loss_of(own: State, factor: float = 1.0) -> Tensor:
    return factor * own.student(torch.ones(2, 4)).square().sum()


def step(own: State, factor: float = 1.0) -> None:
    own.set_rate(0.1)
    own.descend(loss_of(own, factor))
    own.advance()


def weights(own: State) -> Tensor:
    return torch.cat([p.detach().flatten() for p in own.student.parameters()])


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


OVERFLOWS = 1e36  # times the scale of 65536 more than float32 holds, while the loss itself is a number


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


def test_the_average_takes_no_skipped_step() -> None:
    """Two skipped steps among four leave the average of a run of the other two, ramp included."""
    short, long = (state(amp="fp16", ema=0.9) for _ in range(2))
    for factor in (1.0, 1.0):
        step(short, factor)
    for factor in (OVERFLOWS, 1.0, OVERFLOWS, 1.0):
        step(long, factor)
    plain = state(ema=0.9)
    step(plain)
    step(plain)
    results = [own.average.network.weight for own in (short, long, plain)]  # type: ignore[union-attr]
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], rtol=1e-6, atol=1e-7)  # the decay in float32 here


def test_the_average_is_its_definition() -> None:
    own = state(ema=0.5, momentum=0.0)
    wanted = own.student.weight.detach().clone()  # type: ignore[union-attr]
    for n in range(1, 9):
        step(own)
        decay = min(0.5, (1 + n) / (10 + n))
        wanted = decay * wanted + (1 - decay) * own.student.weight.detach()  # type: ignore[operator, union-attr]
    torch.testing.assert_close(own.result.weight, wanted, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"amp": "fp16", "ema": 0.9}, {"momentum": 0.0}])
def test_a_state_that_was_saved_goes_on_alike(tmp_path: Path, changes: dict[str, object]) -> None:
    own = state(**changes)
    for factor in (1.0, OVERFLOWS if "amp" in changes else 1.0):
        step(own, factor)
    own.save(tmp_path, {})
    other = state(**changes)
    with torch.no_grad():
        other.student.weight.zero_()  # type: ignore[operator, union-attr]
    content = read_checkpoint(tmp_path, {}, CPU)
    assert content is not None
    other.load(content)
    for each in (own, other):
        step(each)
    assert torch.equal(weights(own), weights(other)) and own.measured() == other.measured()
    assert torch.equal(own.result.weight, other.result.weight)  # type: ignore[arg-type]


def guard(**given: object) -> Guard:
    return Guard(lambda x: x, lambda step: [10 * step, 10 * step + 1], "a checkpoint", **given)  # type: ignore[arg-type]


def test_the_guard_means_what_came_since_and_names_what_is_no_number() -> None:
    own = guard()
    for at, loss in enumerate([1.0, 3.0], 1):
        own.add(at, torch.tensor(loss))
    assert own.report(0) == 2
    own.add(3, torch.tensor(5.0))
    kept = own.pending()
    assert own.pending() == kept and own.report(0) == 5 and own.pending() == []
    assert guard(pending=kept).report(0) == 5
    own.add(4, torch.tensor(1.0))
    own.add(5, torch.tensor(math.nan))
    own.add(6, torch.tensor(math.nan))
    with pytest.raises(UsageError, match=r"loss of step 5 is nan.*images of step 5: 50, 51\..*a checkpoint"):
        own.pending()


def test_weights_that_are_no_numbers_never_become_a_checkpoint() -> None:
    network = nn.Linear(4, 3)
    guard().check_weights(7, network)
    with torch.no_grad():
        network.bias[1] = math.inf
    with pytest.raises(UsageError, match=r"weights after step 7 are not finite.*images of step 7: 70, 71"):
        guard().check_weights(7, network)


def test_a_run_that_skips_every_step_stops() -> None:
    own = guard(skipped=5)
    for at in range(HOPELESS):
        own.add(at, torch.tensor(1.0))
    with pytest.raises(UsageError, match="not finite at any scale"):
        own.report(5 + HOPELESS)
    own = guard(skipped=5)
    for at in range(HOPELESS):
        own.add(at, torch.tensor(1.0))
    assert own.report(5 + HOPELESS - 1) == 1
