"""Muon: orthogonal updates of filters, SGD's own for the rest."""

from typing import Any

import pytest
import torch
from torch import nn

from dfkd import teachers
from dfkd.config import TrainConfig
from dfkd.errors import UsageError
from dfkd.training.muon import filters, orthogonal
from dfkd.training.state import State

CPU = torch.device("cpu")


def state(network: nn.Module, **changes: Any) -> State:
    return State(network, TrainConfig.of(steps=4, lr=0.1, weight_decay=0.0).replace(**changes), CPU)


def step(own: State, images: torch.Tensor) -> None:
    own.set_rate(0.05)  # half of the highest rate
    own.descend(own.network(images).square().mean())
    own.advance()


def test_updates_of_filters_are_orthogonal_and_of_the_rate_asked() -> None:
    """The polynomials leave singular values between 0.7 and 1.2, whatever they were (bfloat16: 3 digits)."""
    torch.manual_seed(0)
    for shape in ((6, 20), (20, 6), (1, 9)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape) * 1e3).float())
        assert values.min() > 0.65 and values.max() < 1.25
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 16, 1), nn.Flatten(), nn.Linear(16, 3))
    before = [p.detach().clone() for p in network.parameters()]
    step(state(network, optimiser="muon", muon_lr=0.2, momentum=0.0), torch.randn(8, 2, 3, 3))
    moved = [was - p.detach() for was, p in zip(before, network.parameters(), strict=True)]
    for place, length in ((0, 0.1), (2, 0.1 * 2)):  # 16 rows of 4: sqrt(16 / 4) times the rate
        gradient = list(network.parameters())[place].grad
        assert gradient is not None
        torch.testing.assert_close(moved[place].flatten(1), length * orthogonal(gradient.flatten(1)).float())


class Idle(nn.Module):
    """A network without convolutions, beside one that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.LayerNorm(3))
        self.idle = nn.Conv2d(3, 3, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answers: torch.Tensor = self.body(images)
        return answers


def test_a_network_without_filters_is_refused() -> None:
    with pytest.raises(UsageError, match="--optimiser muon with Sequential: it has no convolutions"):
        state(Idle().body, optimiser="muon")


def test_what_is_no_filter_takes_the_steps_of_sgd() -> None:
    changes = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "decay": "weights"}
    runs = []
    for optimiser in ("sgd", "muon"):
        torch.manual_seed(0)
        own = state(Idle(), optimiser=optimiser, **changes)
        for _ in range(3):
            step(own, torch.ones(2, 3, 2, 2))
        runs.append(torch.cat([p.detach().flatten() for p in own.network.parameters()]))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-6, atol=1e-7)  # the same sums, fused or not


def test_filters_are_those_of_ungrouped_convolutions_that_are_learned() -> None:
    assert len(filters(teachers.build("resnet8", 2))) == 9
    layers = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1).requires_grad_(False), nn.Conv2d(4, 4, 1))
    assert [p is layers[2].weight for p in filters(layers)] == [True]
