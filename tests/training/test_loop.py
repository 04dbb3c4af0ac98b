"""The loop of teacher and student: stopped anywhere it ends with the same bits, and what it refuses."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dfkd.config import TrainConfig
from dfkd.data import dali_installed
from dfkd.errors import Stopped, UsageError
from dfkd.files import folder_lock
from dfkd.training.loop import order_of
from dfkd.training.world import World, deferred
from tests.training.small_run import (
    Killed,
    close,
    dies,
    equal,
    lines,
    network,
    pool,
    run,
    run_teacher,
    settings,
    signals,
    splits,
    teacher,
    teacher_settings,
)

CPU = World(torch.device("cpu"))


def student_run(out: Path, **changes: Any) -> dict[str, Any]:
    given = {name: changes.pop(name) for name in ("progress", "data", "student", "teacher") if name in changes}
    return run(out, settings(**changes), **given)


def teacher_run(out: Path, **changes: Any) -> dict[str, Any]:
    given = {name: changes.pop(name) for name in ("progress", "data") if name in changes}
    return run_teacher(out, teacher_settings(**changes), **given)


BOTH = [pytest.param(student_run, "last", id="student"), pytest.param(teacher_run, ".", id="teacher")]
# What a resumed run has to get right: views, averages, mixtures, labels, precision, dropout, BatchNorm, clipping.
RICH: list[tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = [
    (student_run, {"ema": 0.9, "mix": "both", "warmup": 2, "augment": "affine-colour"}),
    (student_run, {"ce_weight": 1.0, "amp": "bf16", "clip_norm": 1.0, "augment": "rrc-flip"}),
    (student_run, {"optimiser": "muon", "ema": 0.9, "augment": "crop-flip-cutout", "schedule": "cosine"}),
    (teacher_run, {"optimiser": "muon", "augment": "crop-altflip", "schedule": "constant", "checkpoint_every": 3}),
    (teacher_run, {"schedule": "onecycle", "amp": "bf16", "ema": 0.9, "label_smoothing": 0.1, "nesterov": True}),
]


@pytest.mark.parametrize(("runs", "changes"), RICH)
@pytest.mark.parametrize("step", [2, 7])
def test_a_killed_run_resumes_to_the_same_bits(
    tmp_path: Path, runs: Callable[..., dict[str, Any]], changes: dict[str, Any], step: int
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    changes = {**changes, "checkpoint_every": 3}
    runs(whole, **changes)
    with pytest.raises(Killed):
        runs(killed, progress=dies(step), **changes)
    assert (killed / "checkpoint.pt").exists() and not (killed / "result.json").exists()
    torch.rand(7)  # whatever else the new process draws
    runs(killed, **changes)
    folders = ("last", "best") if runs is student_run else (".",)
    assert all(equal(whole / name, killed / name) for name in folders)
    assert lines(whole) == lines(killed) and not (killed / "checkpoint.pt").exists()


@pytest.mark.parametrize(("runs", "folder"), BOTH)
@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 1), (signal.SIGINT, 5)])
def test_a_signal_stops_after_the_step_and_the_run_goes_on_from_there(
    tmp_path: Path, runs: Callable[..., dict[str, Any]], folder: str, number: int, step: int
) -> None:
    changes = {"ema": 0.9, "checkpoint_every": 100}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    runs(whole, **changes)
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped, match=f"stopped after step {step + 1} of 12") as stop:
        runs(stopped, progress=signals(number, step), **changes)
    assert stop.value.signum == number
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not (stopped / ".lock").exists()
    runs(stopped, **changes)
    assert equal(whole / folder, stopped / folder)
    assert lines(whole) == lines(stopped)  # losses before the stop are in the means after it


def test_a_signal_in_the_last_step_finds_a_finished_run(tmp_path: Path) -> None:
    assert student_run(tmp_path, progress=signals(signal.SIGTERM, 11))["steps"] == 12


def test_who_interrupts_twice_does_not_wait() -> None:
    with deferred() as received:
        assert received() == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert received() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert received() == signal.SIGINT


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path: Path) -> None:
    before, found = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(
        target=lambda: found.append(student_run(tmp_path, steps=2) and signal.getsignal(signal.SIGTERM))
    )
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize(("runs", "folder"), BOTH)
def test_a_finished_run_is_not_trained_again(tmp_path: Path, runs: Callable[..., dict[str, Any]], folder: str) -> None:
    first = runs(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert runs(tmp_path, progress=dies(0)) == first
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    calls: list[int] = []
    runs(tmp_path, resume=False, progress=lambda done, total: calls.append(done))
    assert calls == [8 * step for step in range(13)]
    (tmp_path / folder / "model.safetensors").unlink()  # a result without its weights is none
    assert runs(tmp_path)["steps"] == 12 and (tmp_path / folder / "model.safetensors").exists()


@pytest.mark.parametrize(("runs", "folder"), BOTH)
@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_of_other_settings_or_data_is_refused_and_kept(
    tmp_path: Path, runs: Callable[..., dict[str, Any]], folder: str, finished: bool
) -> None:
    if finished:
        runs(tmp_path)
    else:
        with pytest.raises(Killed):
            runs(tmp_path, progress=dies(2))
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"lr is 0\.05 there and 0\.1 here; momentum is 0\.9 there and 0\.5 here"):
        runs(tmp_path, lr=0.1, momentum=0.5)
    with pytest.raises(UsageError, match="data is "):
        runs(tmp_path, data=pool(41) if runs is student_run else splits(41))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    assert runs(tmp_path, lr=0.1, resume=False)["run"]["lr"] == 0.1
    assert runs(tmp_path, lr=0.1, loader="torch", workers=0, progress=dies(0))["steps"] == 12


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with folder_lock(tmp_path), pytest.raises(UsageError, match="is in use"):
        student_run(tmp_path)


def test_files_that_are_damaged_are_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"checkpoint\.pt is damaged: .*tensors only") as caught:
        student_run(tmp_path)
    assert "weights_only" not in str(caught.value)
    (tmp_path / "result.json").write_text('{"accuracy": 1}')
    with pytest.raises(UsageError, match=r"result\.json was not written by this version.*--no-resume"):
        student_run(tmp_path)


def test_a_run_follows_its_seed_and_leaves_torchs_generators_alone(tmp_path: Path) -> None:
    given = {"student": network(0), "teacher": teacher(), "data": pool()}
    before = torch.get_rng_state()
    student_run(tmp_path / "one", seed=1, **given)
    run_teacher(tmp_path / "teacher", teacher_settings(seed=1), data=(data := splits()))
    assert torch.equal(torch.get_rng_state(), before)
    student_run(tmp_path / "two", seed=2)
    run_teacher(tmp_path / "other", teacher_settings(seed=2), data=data)
    assert not equal(tmp_path / "one/last", tmp_path / "two/last")
    assert not equal(tmp_path / "teacher", tmp_path / "other")


def test_all_loaders_train_the_same_student(tmp_path: Path) -> None:
    student_run(tmp_path / "resident", loader="resident")
    student_run(tmp_path / "torch", loader="torch", workers=0)
    assert equal(tmp_path / "resident/last", tmp_path / "torch/last")
    if dali_installed():
        student_run(tmp_path / "dali", loader="dali")
        close(tmp_path / "dali/last", tmp_path / "torch/last", 1e-4)  # normalised in another order


class Breaks(nn.Module):
    """A network that answers NaN in its fifth training step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = network(0), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        answers: torch.Tensor = self.inner(x)
        return answers * (float("nan") if self.calls == 5 else 1.0)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the loss of step 5 is nan: the run has diverged; images of step 5: ") as stop:
        student_run(tmp_path, checkpoint_every=2, student=Breaks())
    assert str(tmp_path / "checkpoint.pt") in str(stop.value)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4


def test_weights_that_diverge_leave_the_checkpoint_before_them(tmp_path: Path) -> None:
    """The step whose update overflows has a finite loss; what it leaves must not replace what can be gone back to."""
    with pytest.raises(UsageError, match="the weights after step 1 are not finite"):
        student_run(tmp_path, lr=3e38, weight_decay=1e9, momentum=0.0, checkpoint_every=1)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["network"]
    assert all(value.isfinite().all() for value in kept.values())


def test_every_batch_has_one_size() -> None:
    """BatchNorm of a last batch of one image would leave its statistics behind."""
    order = order_of(TrainConfig.of(epochs=3, batch_size=8), 36, CPU)
    assert order.steps == 13 and {order.size(step) for step in range(13)} == {8}
    order = order_of(TrainConfig.of(epochs=2, batch_size=256), 36, CPU)
    assert order.steps == 1 and order.size(0) == 72
    with pytest.raises(UsageError, match="--batch-size 2 with 3 processes"):
        order_of(TrainConfig.of(steps=2, batch_size=2), 36, World(torch.device("cpu"), 0, 3))


def test_checks_come_when_asked(tmp_path: Path) -> None:
    for every, checks in ((3, 4), (5, 3)):
        student_run(tmp_path / str(every), checkpoint_every=every)
        assert sum("agreement" in line for line in lines(tmp_path / str(every))) == checks
