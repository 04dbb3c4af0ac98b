"""What a run tells: the same numbers to every log, taken back where it repeats itself; and the guard."""

import math
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dfkd.config import LoggingConfig
from dfkd.errors import UsageError
from dfkd.logs import check_logs
from dfkd.training.guard import HOPELESS, Guard
from tests.training.small_run import Killed, dies, lines, run, settings


def guard(**given: Any) -> Guard:
    return Guard(lambda x: x, lambda step: [10 * step, 10 * step + 1], "a checkpoint", **given)


def test_the_guard_means_what_came_since_and_names_what_is_no_number() -> None:
    own = guard()
    for at, loss in enumerate([1.0, 3.0], 1):
        own.add(at, torch.tensor(loss))
    assert own.report(0) == 2
    own.add(3, torch.tensor(5.0))
    kept = own.pending()
    assert own.pending() == kept and own.report(0) == 5 and own.pending() == []
    assert guard(pending=kept).report(0) == 5
    for at, loss in ((4, 1.0), (5, math.nan), (6, math.nan)):
        own.add(at, torch.tensor(loss))
    with pytest.raises(UsageError, match=r"loss of step 5 is nan.*images of step 5: 50, 51\..*a checkpoint"):
        own.pending()


def test_of_a_large_batch_that_diverged_some_images_are_named() -> None:
    own = Guard(lambda x: x, lambda step: range(128), "a checkpoint")
    own.add(1, torch.tensor(math.nan))
    with pytest.raises(UsageError, match=r"images of step 1: 0, 1, .*, 9, \.\.\. \(128 in all\)\."):
        own.report(0)


def test_weights_that_are_no_numbers_never_become_a_checkpoint() -> None:
    network = nn.Linear(4, 3)
    guard().check_weights(7, network)
    with torch.no_grad():
        network.bias[1] = math.inf
    with pytest.raises(UsageError, match=r"weights after step 7 are not finite.*images of step 7: 70, 71"):
        guard().check_weights(7, network)


def test_a_run_that_skips_every_step_stops() -> None:
    for skipped in (HOPELESS, HOPELESS - 1):
        own = guard(skipped=5)
        for at in range(HOPELESS):
            own.add(at, torch.tensor(1.0))
        if skipped == HOPELESS:
            with pytest.raises(UsageError, match="not finite at any scale"):
                own.report(5 + skipped)
        else:
            assert own.report(5 + skipped) == 1


class Writer:
    """Stands in for tensorboard's SummaryWriter and for a run of wandb."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self.given, self.named, self.closed = given, named, False
        self.told: list[tuple[int, str, float]] = []
        self.shown: list[tuple[int, str, tuple[int, ...]]] = []

    def add_scalar(self, name: str, value: float, at: int) -> None:
        self.told.append((at, name, value))

    def add_image(self, name: str, pixels: np.ndarray, at: int, dataformats: str) -> None:
        assert dataformats == "HWC"
        self.shown.append((at, name, pixels.shape))

    def log(self, measured: dict[str, Any], step: int) -> None:
        shown = {name: value for name, value in measured.items() if isinstance(value, Shown)}
        self.shown += [(step, name, np.asarray(value.picture).shape) for name, value in shown.items()]
        self.told += [(step, name, value) for name, value in measured.items() if name not in shown]

    def close(self) -> None:
        self.closed = True

    finish = close


@dataclass
class Shown:
    """Stands in for wandb.Image."""

    picture: Image.Image


def installed(patch: pytest.MonkeyPatch, package: str, **content: object) -> None:
    for name in ("wandb",) if package == "wandb" else ("tensorboard", "torch.utils.tensorboard"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(content)
        patch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("option", [{"tensorboard": True}, {"wandb": "digits"}], ids=["tensorboard", "wandb"])
def test_another_log_has_the_numbers_of_log_jsonl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: dict[str, Any]
) -> None:
    """A stopped run opens it again, and closes it either way."""
    made: list[Writer] = []

    def make(*given: Any, **named: Any) -> Writer:
        made.append(Writer(*given, **named))
        return made[-1]

    installed(monkeypatch, *option, init=make, SummaryWriter=make, Image=Shown)
    out, config = tmp_path / "out", settings(checkpoint_every=3, **option)
    with pytest.raises(Killed):
        run(out, config, progress=dies(7))
    run(out, config)
    first, second = made
    assert first.closed and second.closed
    numbers = [(line["step"], name, value) for line in lines(out) for name, value in line.items() if name != "step"]
    assert [line for line in first.told if line[0] <= 6] + second.told == numbers
    ((step, name, (_, _, channels)),) = first.shown  # the views, once
    assert (step, name, channels) == (0, "views", 3) and not second.shown
    assert {name for _, name, _ in numbers} >= {"loss", "agreement"}
    if "wandb" in option:
        assert first.named == second.named  # the same run goes on
        assert {"project": "digits", "name": "out", "resume": "allow"}.items() <= first.named.items()
    else:
        assert first.given == second.given == (str(out / "tensorboard"),)
        assert (first.named, second.named) == ({"purge_step": None}, {"purge_step": 7})


def test_a_service_that_cannot_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(**named: object) -> Writer:
        raise ConnectionError("no route\nat all")

    installed(monkeypatch, "wandb", init=offline)
    with pytest.raises(UsageError, match=r"--wandb digits could not start: ConnectionError: no route\. .*WANDB_MODE"):
        run(tmp_path, settings(wandb="digits"))


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "wandb")
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb.py").write_text("import no_such_part_of_it")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match=r"--wandb digits could not start: ModuleNotFoundError: .*no_such_part_of_it"):
        run(tmp_path / "out", settings(wandb="digits"))


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_log_whose_package_is_absent_is_refused(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    wanted = LoggingConfig(tensorboard=package == "tensorboard", wandb="digits" if package == "wandb" else None)
    with pytest.raises(UsageError, match=f"--{package} needs the package {package}: it is not installed. pip install"):
        check_logs(wanted)
