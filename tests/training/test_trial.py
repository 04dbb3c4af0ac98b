"""What cannot be trained is refused before the first step, and what gets no gradient is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dfkd.data import Form
from dfkd.errors import UsageError
from dfkd.training.step import Step
from dfkd.training.trial import without_gradient
from dfkd.training.world import World
from tests.training.small_run import Spare, network, pool, run, settings

FORM = Form(8, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), torch.device("cpu"))


def vectors() -> nn.Module:
    """BatchNorm over vectors, which has no variance of one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def test_a_network_is_tried_and_stays_as_it_was() -> None:
    tried = network(0).eval()
    before = {key: value.clone() for key, value in tried.state_dict().items()}
    drawn = torch.get_rng_state()
    assert without_gradient(tried, FORM, 8) == ()
    assert all(torch.equal(before[key], value) for key, value in tried.state_dict().items()) and not tried.training
    assert torch.equal(drawn, torch.get_rng_state()) and all(p.grad is None for p in tried.parameters())


def test_parameters_without_a_gradient_are_named_and_stay(tmp_path: Path) -> None:
    assert without_gradient(Spare(), FORM, 8) == ("spare.weight", "spare.bias")
    student, said = Spare(), []
    before = student.spare.weight.detach().clone()
    run(tmp_path, settings(steps=2), student=student, say=said.append)
    assert any("2 parameters get no gradient and stay as they are: spare.weight, spare.bias" in text for text in said)
    assert torch.equal(student.spare.weight, before)


def test_under_torchrun_ddp_is_told_to_look_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def shared(network: nn.Module, device_ids: Any, find_unused_parameters: bool) -> nn.Module:
        asked.append(find_unused_parameters)
        return network

    monkeypatch.setattr("dfkd.training.world.DistributedDataParallel", shared)
    world = World(torch.device("cpu"), 0, 2)
    for unused in (False, True):
        world.shared(network(0), unused)
    assert asked == [False, True] and Step.__init__.__defaults__ == (False,)


@pytest.mark.parametrize(
    ("student", "words"),
    [
        (network(0).requires_grad_(False), "Sequential has nothing to learn: it has no parameters, or all of them are"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), "Sequential has nothing to learn"),
    ],
)
def test_what_has_nothing_to_learn_is_refused(tmp_path: Path, student: nn.Module, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run(tmp_path, student=student)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_batch_norm_of_one_image_is_refused_where_it_would_fail(tmp_path: Path) -> None:
    """Three images, one of them held out: batches of two are well; two images leave one to learn from."""
    run(tmp_path / "two", settings(epochs=1), data=pool(3), student=vectors())
    assert without_gradient(network(0), FORM, 1) == ()  # its maps have many values
    with pytest.raises(UsageError, match="batches of 1 image for Sequential: BatchNorm of a vector"):
        run(tmp_path / "one", settings(epochs=1), data=pool(2), student=vectors())
    assert not (tmp_path / "one" / "checkpoint.pt").exists()
