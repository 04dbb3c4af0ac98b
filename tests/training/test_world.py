"""Two processes under torchrun, on the CPU: the losses of one, one signal for both, and a killed one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dfkd.training.checks import check_computation, check_last_batch
from dfkd.training.normalisation import synchronised
from dfkd.training.world import Agreement, World, join
from dfkd.errors import UsageError
from dfkd.data.loader import Order
from tests.cli.test_distill import arguments, save_teacher
from tests.training.ranks_program import EQUAL, NORMALISED, normalised_network, plain_network
from tests.training.small_run import network, settings
from tests.training.test_train import equal, run
from tests.shard_folders import CLASS_NAMES, make

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TWO = World(CPU, 1, 2)


def losses(path: Path) -> list[float]:
    lines = map(json.loads, (path / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What two processes left, one of which was killed on the way, and what they printed."""
    out = tmp_path_factory.mktemp("ranks")
    save_teacher(out / "teacher", CLASS_NAMES)
    make(out / "synthetic", count=24, size=32, shard_size=8)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    program = str(ROOT / "tests/distillation/ranks_program.py")
    done = subprocess.run(
        [sys.executable, *words, program, str(out), *arguments(out, out / "command")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_have_the_losses_of_one(made: tuple[Path, str], tmp_path: Path, name: str) -> None:
    """Where the student does not look across a batch only the order of sums differs: measured 4e-5 over 12 steps."""
    run(tmp_path, settings(**EQUAL[name]), student=plain_network())
    alone, shared = losses(tmp_path), losses(made[0] / name)
    assert len(alone) == len(shared) > 3
    torch.testing.assert_close(torch.tensor(shared), torch.tensor(alone), rtol=1e-4, atol=1e-7)
    mine, theirs = (load_file(path / "last" / "model.safetensors") for path in (made[0] / name, tmp_path))
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_batch_norm_of_each_part_stays_near_that_of_the_whole(made: tuple[Path, str], tmp_path: Path) -> None:
    """16 rows of 8x8 in each process and 32 in one: statistics of half as many values, measured 3 % of the loss."""
    run(tmp_path, settings(**NORMALISED), student=normalised_network())
    alone, shared = torch.tensor(losses(tmp_path)), torch.tensor(losses(made[0] / "normalised"))
    assert not torch.equal(alone, shared)
    assert ((shared - alone).abs() / alone).max() < 0.1


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(made: tuple[Path, str]) -> None:
    out, _ = made
    said = [json.loads((out / f"stopped-{rank}").read_text()) for rank in (0, 1)]
    assert said[0] == said[1] == [15, "stopped after step 5 of 12; started again it goes on"]
    assert equal(out / "unstopped", out / "stopped")


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_student_is_the_same(made: tuple[Path, str]) -> None:
    out, _ = made
    assert [(out / f"lives-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    for name in ("last", "best"):
        assert equal(out / "whole", out / "killed", name)
    assert (out / "whole/log.jsonl").read_text() == (out / "killed/log.jsonl").read_text()


@pytest.mark.slow
def test_what_the_first_process_refuses_all_refuse(made: tuple[Path, str]) -> None:
    said = [(made[0] / f"refused-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and "lr is 0.05 there and 0.01 here" in said[0]


@pytest.mark.slow
def test_the_command_prints_one_result(made: tuple[Path, str]) -> None:
    out, printed = made
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert len(lines) == 2 and lines[0] == lines[1]  # of the first life, and again of the second
    assert lines[0]["processes"] == 2 and lines[0] == json.loads((out / "command" / "result.json").read_text())


def test_alone_nothing_is_asked_of_anyone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # of some other launcher
    with join("cpu") as world:
        assert (world.rank, world.size, world.first) == (0, 1, True)
        assert world.from_first(lambda: 3) == 3 and Agreement(world)(15) == 15
        student = network(0)
        assert world.shared(student) is student
        assert torch.equal(world.mean(torch.ones(2)), torch.ones(2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sync_bn": "on"}, "--sync-bn on on cpu: torch's SyncBatchNorm is for GPUs"),
        ({"batch_size": 1}, "--batch-size 1 with 2 processes"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        check_computation(settings(**changes), TWO)
    check_computation(settings(**changes), World(CPU))


def test_a_last_batch_without_an_image_for_each_is_refused() -> None:
    with pytest.raises(UsageError, match="the last batch of the run has 1 images"):
        check_last_batch(Order(0, 25, 8, 25, 0, 2))
    check_last_batch(Order(0, 25, 8, 26, 0, 2))


def test_batch_norm_is_synchronised_where_that_acts() -> None:
    gpus = World(torch.device("cuda"), 0, 2)

    def layers(wanted: str, world: World) -> int:
        changed = synchronised(network(0), wanted, world)
        assert changed.state_dict().keys() == network(0).state_dict().keys()
        return sum(isinstance(layer, torch.nn.SyncBatchNorm) for layer in changed.modules())

    assert layers("auto", gpus) == layers("on", gpus) == 1
    assert layers("off", gpus) == layers("auto", TWO) == layers("on", World(CPU)) == 0


def test_gpus_of_several_processes_are_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}
    for name, value in {"TORCHELASTIC_RUN_ID": "x", **ranks}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="torchrun starts 3 processes here: torch sees 2 GPUs"), join("cuda"):
        pass
    with pytest.raises(UsageError, match="--device cuda:1 with several processes"), join("cuda:1"):
        pass
