"""Two processes under torchrun, on the CPU: the losses of one, one signal for both, and one that dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfkd.errors import UsageError
from dfkd.training.world import Agreement, join
from tests.cli.small_generate import save_classifier
from tests.shard_folders import CLASS_NAMES, make
from tests.training.ranks_program import EQUAL, plain_network
from tests.training.small_run import close, equal, lines, network, result, run, settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What two processes left, one of which died on the way, and what they printed."""
    out = tmp_path_factory.mktemp("ranks")
    save_classifier(out / "teacher", names=CLASS_NAMES)
    make(out / "synthetic", count=24, size=16, shard_size=8)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    given = ["--data", out / "synthetic", "--teacher-checkpoint", out / "teacher", "--out", out / "command"]
    given += ["--student", "resnet8", "--steps", "4", "--batch-size", "8", "--device", "cpu"]
    program = ROOT / "tests/training/ranks_program.py"
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "engine", "kernels"))
    done = subprocess.run(
        [sys.executable, *words, str(program), str(out), *map(str, given)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_have_the_losses_of_one(made: tuple[Path, str], tmp_path: Path, name: str) -> None:
    """Where the student does not look across a batch only the order of sums differs: measured 4e-5 over 12 steps."""
    run(tmp_path, settings(**EQUAL[name]), student=plain_network())
    alone, shared = ([line["loss"] for line in lines(out) if "loss" in line] for out in (tmp_path, made[0] / name))
    assert len(alone) == len(shared) >= 6
    torch.testing.assert_close(torch.tensor(shared), torch.tensor(alone), rtol=1e-4, atol=1e-7)
    close(made[0] / name / "last", tmp_path / "last", 1e-4)
    assert result(made[0] / name)["processes"] == 2


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(made: tuple[Path, str]) -> None:
    out, _ = made
    said = [json.loads((out / f"stopped-{rank}").read_text()) for rank in (0, 1)]
    assert said[0] == said[1] == [15, "stopped after step 5 of 12; started again it goes on"]
    assert equal(out / "unstopped/last", out / "stopped/last")


@pytest.mark.slow
def test_a_process_that_dies_is_started_again_and_the_teacher_is_the_same(made: tuple[Path, str]) -> None:
    out, _ = made
    assert [(out / f"lives-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    assert equal(out / "whole", out / "killed") and lines(out / "whole") == lines(out / "killed")


@pytest.mark.slow
def test_what_the_first_process_refuses_all_refuse(made: tuple[Path, str]) -> None:
    said = [(made[0] / f"refused-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and "lr is 0.05 there and 0.01 here" in said[0]


@pytest.mark.slow
def test_a_parameter_without_a_gradient_does_not_stop_them(made: tuple[Path, str]) -> None:
    assert result(made[0] / "spare")["steps"] == 3


@pytest.mark.slow
def test_the_command_prints_one_result(made: tuple[Path, str]) -> None:
    out, printed = made
    found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert len(found) == 2 and found[0] == found[1]  # of the first life, and again of the second
    assert found[0]["processes"] == 2 and found[0] == result(out / "command")


def test_alone_nothing_is_asked_of_anyone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # of some other launcher
    with join("cpu") as world:
        assert (world.rank, world.size, world.first) == (0, 1, True)
        assert world.from_first(lambda: 3) == 3 and Agreement(world)(15) == 15
        student = network(0)
        assert world.shared(student) is student
        assert torch.equal(world.mean(torch.ones(2)), torch.ones(2))


def test_gpus_of_several_processes_are_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}
    for name, value in {"TORCHELASTIC_RUN_ID": "x", **ranks}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="torchrun starts 3 processes here: torch sees 2 GPUs"), join("cuda"):
        pass
    with pytest.raises(UsageError, match="--device cuda:1 with several processes"), join("cuda:1"):
        pass
