"""Runs that signals stop: SIGTERM and SIGINT with a checkpoint at the end of the step, SIGKILL at any moment."""

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from dfkd.training.signals import deferred
from dfkd.training.train import distill
from dfkd.errors import Stopped, UsageError
from tests.training.killed_runs import RUNS
from tests.training.small_run import network, pool, sending, settings, teacher
from tests.training.test_train import equal, run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 4, 9])
def test_a_signal_stops_after_the_step_and_the_run_goes_on_from_there(tmp_path: Path, number: int, step: int) -> None:
    options = settings(ema=0.9, mix="both", checkpoint_every=100)
    run(tmp_path / "whole", options)
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    stopped = tmp_path / "stopped"
    with pytest.raises(Stopped, match=f"stopped after step {step + 1} of 12") as stop:
        given = {"architecture": "tiny", "watch": sending(number, step)}
        distill(pool(), teacher(), network(0), options, stopped, **given)  # type: ignore[arg-type]
    assert stop.value.signum == number
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not (stopped / "last").exists() and not (stopped / ".lock").exists()
    run(stopped, options, kill_after=None, student=network(99))
    assert equal(tmp_path / "whole", stopped)
    logs = [(path / "log.jsonl").read_text() for path in (tmp_path / "whole", stopped)]
    assert logs[0] == logs[1]  # losses before the stop are in the means after it


def test_a_signal_in_the_last_step_finds_a_finished_run(tmp_path: Path) -> None:
    given = {"architecture": "tiny", "watch": sending(signal.SIGTERM, 11)}
    distill(pool(), teacher(), network(0), settings(), tmp_path, **given)  # type: ignore[arg-type]
    assert (tmp_path / "last" / "model.safetensors").exists()


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
        target=lambda: found.append(run(tmp_path, settings(steps=2)) and signal.getsignal(signal.SIGTERM))
    )
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.slow
def test_killed_at_random_steps_a_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.killed_runs", str(tmp_path), str(seed)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"seed {seed}: {done.stdout} {done.stderr}"
    assert str(int(signal.SIGKILL)) in done.stdout
    for name in RUNS:
        whole, killed = tmp_path / name / "whole", tmp_path / name / "killed"
        for student in ("last", "best"):
            assert equal(whole, killed, student), f"seed {seed}, {name}: {done.stdout}"
        assert (whole / "log.jsonl").read_text() == (killed / "log.jsonl").read_text(), f"seed {seed}, {name}"


def test_weights_that_diverge_leave_the_checkpoint_before_them(tmp_path: Path) -> None:
    """The step whose update overflows has a finite loss; what it leaves must not replace what can be gone back to."""
    options = settings(lr=3e38, weight_decay=1e9, momentum=0.0, checkpoint_every=1)
    with pytest.raises(UsageError, match="the weights after step 1 are not finite"):
        run(tmp_path, options)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["student"]
    assert all(value.isfinite().all() for value in kept.values())
