"""Kernels compiled ahead of time for three generations of GPUs: nothing spills, and accesses are wide."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="the kernels need Triton")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Compiled in a process of its own: in this one the kernels are interpreted."""
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("this Triton ships no cuobjdump to read a cubin with")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "benchmarks.kernel_resources"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_spills(table):
    assert {row["sm"] for row in table} == {80, 90, 100}
    assert not [row for row in table if row["spilled_bytes"] or row["stack_bytes"]]


# Rows of 40 bytes, of an odd number of values, and maps of 7x7; and latents of a partner, which lie anywhere.
UNALIGNED = ("soft_kl kernel 10 ", "soft_kl kernel 21841 ", "bn_moments forward 2048x7x7 fp16 contiguous")
UNALIGNED += ("bn_moments backward 2048x7x7 fp16 contiguous", "guided_step kernel 4x64x64 every term")
# A few numbers of each channel or group: launches that write no more, or read no more.
FEW = {"store": (" moments ", " statistics ", " no sums"), "load": (" statistics ",)}


def test_accesses_are_128_bits_wide(table):
    aligned = [row for row in table if not row["kernel"].startswith(UNALIGNED)]
    assert len(aligned) == len(table) - len(UNALIGNED) * 3
    for access, few in FEW.items():
        wide = [row for row in aligned if not any(name in row["kernel"] for name in few)]
        assert len(wide) > len(aligned) / 2
        assert not [row for row in wide if row[f"widest_{access}_bits"] < 128]
