"""dfkd-generate killed by SIGKILL at random moments and started again: the bytes of a run that never was."""

import os
import subprocess
import sys
from pathlib import Path

from tests.cli.small_generate import shards_of

ROOT = Path(__file__).resolve().parents[2]

KILLS = """
import glob, os, random, signal, sys, time

from dfkd.cli.generate import main  # imported once; every fork is a fresh run, torch has computed nothing yet

out, moments, argv = sys.argv[1], int(sys.argv[2]), sys.argv[3:]


def start(folder):
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        main(["--out", folder, *argv])
    except SystemExit as done:
        os._exit(int(done.code or 0))
    finally:
        os._exit(99)


began = time.perf_counter()
assert os.waitpid(start(out + "/whole"), 0)[1] == 0
seconds = time.perf_counter() - began
killed = []
for moment in range(moments):
    child = start(out + "/killed")
    wait = seconds * random.random()
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    killed.append((round(wait / seconds, 3), status, len(glob.glob(out + "/killed/shard-*.tar"))))
assert os.waitpid(start(out + "/killed"), 0)[1] == 0
print(killed)
"""


def check_killed(folder, argv, loaded=""):
    """Four shards, an index beside each, of a run that was killed three times equal those of one that was not.

    loaded: statements that import what a run loads by and by, so that a fork of it begins to sample at once.
    """
    done = subprocess.run(
        [sys.executable, "-c", loaded + KILLS, str(folder), "3", *map(str, argv)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    whole, killed = shards_of(folder / "whole"), shards_of(folder / "killed")
    assert len(whole) == 8 and killed == whole, done.stdout


def test_killed_anywhere_it_ends_with_the_same_bytes(small_prior, small_teacher, tmp_path):
    argv = ["--teacher-checkpoint", small_teacher, "--prior", small_prior, "--count", 14, "--group", 4]
    argv += ["--shard-size", 4, "--steps", 2, "--cutmix-every", 1, "--device", "cpu"]
    check_killed(tmp_path, argv)
    assert not list((tmp_path / "killed").glob("*.partial")) and not (tmp_path / "killed/.lock").exists()
