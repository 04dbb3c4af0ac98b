"""dfkd-generate under torchrun: shards are shared out, and come out as those of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfkd.runtime import device_of
from dfkd.errors import UsageError
from dfkd.runtime import Rank, own_rank
from tests.cli.small_generate import last_line, shards_of

ROOT = Path(__file__).resolve().parents[2]
# The first time that shard 3 is begun, by the second of two processes, it dies as from a lack of memory.
DYING = """
import os, pathlib, signal, sys
from dfkd.data.shards import ShardFolder
from dfkd.cli.generate import main

write, mark = ShardFolder.write, pathlib.Path(sys.argv.pop(1))


def dying(folder, index, *more):
    if index == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return write(folder, index, *more)


ShardFolder.write = dying
main()
"""


def torchrun(code: str, *argv: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", restarts]
    words = [sys.executable, *launch, "--no-python", sys.executable, "-c", code, *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(w) for w in words], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one_and_a_killed_one_is_started_again(
    call, small_prior, small_teacher, tmp_path, capfd
):
    argv = ["--count", 18, "--shard-size", 4, "--group", 4, "--steps", 2, "--device", "cpu", "--cutmix-every", 1]
    assert call("--out", tmp_path / "one", *argv) == 0
    capfd.readouterr()
    places = ["--teacher-checkpoint", small_teacher, "--prior", small_prior, "--out", tmp_path / "two"]
    done = torchrun(DYING, tmp_path / "mark", *places, *argv, restarts=1)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mark").exists()
    one, two = (shards_of(tmp_path / name) for name in ("one", "two"))
    assert len([name for name in one if name.endswith(".tar")]) == 5 and two == one
    one, two = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two"))
    for manifest in (one, two):
        for shard in manifest["shards"]:
            del shard["seconds"]
    assert one == two
    # one of the two speaks: one line of JSON, one plan an attempt
    assert len([line for line in done.stdout.splitlines() if line.startswith("{")]) == 1
    result = last_line(done.stdout)
    assert result["processes"] == 2 and result["class_counts"] == [6, 6, 6]
    assert result == json.loads((tmp_path / "two" / "result.json").read_text())
    assert done.stderr.count("plan: groups of 4 images") == 2
    assert "2 processes share 5 shards" in done.stderr
    left = {file.name for file in (tmp_path / "two").iterdir()} - shards_of(tmp_path / "two").keys()
    assert left == {"manifest.json", "settings.json", "result.json"}


def test_a_rank_is_read_from_torchruns_environment():
    assert own_rank({"RANK": "3", "WORLD_SIZE": "4"}) == Rank()  # another launcher's, or left over
    names = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    rank = own_rank(names)
    assert rank == Rank(3, 4, 1, 2) and not rank.first and Rank(0, 4).first
    owners = [[r for r in range(3) if Rank(r, 3).owns(index)] for index in range(7)]
    assert owners == [[0], [1], [2], [0], [1], [2], [0]]


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch):
    assert device_of("cpu", 1, 2) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("auto", 1, 2) == device_of("cuda", 1, 2) == torch.device("cuda:1")
    assert device_of("cuda:1", 0, 1) == torch.device("cuda:1") and device_of("cuda", 0, 1) == torch.device("cuda")
    with pytest.raises(UsageError, match="--device cuda:0 with several processes"):
        device_of("cuda:0", 1, 2)
    with pytest.raises(UsageError, match="torchrun starts 3 processes here: torch sees 2 GPUs"):
        device_of("auto", 0, 3)
