"""The benchmark of the launches: bytes counted against the tensors themselves, and a turn of it on a CPU."""

import pytest
import torch

from benchmarks import bandwidth
from benchmarks import bench_guided_step as bench
from dfkd_kernels.guided_step import GUIDED_STEPS


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench, "SHAPE", (4, 8, 8))
    monkeypatch.setattr(bandwidth, "CALLS", 1)
    monkeypatch.setattr(bandwidth, "COPY_BYTES", 2**12)
    monkeypatch.setattr(bench, "compiled", lambda step: step)  # takes a minute; what it makes is PyTorch's affair


@pytest.mark.parametrize("launch", bench.LAUNCHES)
def test_bytes_that_must_move_are_those_of_the_tensors(launch):
    call = bench.calls_of(GUIDED_STEPS["torch"], 2, torch.device("cpu"))[launch]
    found = call()
    given = [*call.args, *call.keywords.values()]
    tensors = {id(x): x for x in (*given, *found) if isinstance(x, torch.Tensor) and x.dim() == 4}
    assert bench.moved(launch, 2) == sum(x.numel() * x.element_size() for x in tensors.values())


def test_a_turn():
    pytest.importorskip("triton", reason="the kernels need Triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = bandwidth.bench(bench.launches([2], device), 1, device)
    assert not result["failures"] and len(result["rows"]) == 3 * len(bench.LAUNCHES)
    assert all(r["ratio"] == 1 for r in result["rows"] if r["way"] == "eager")
    assert bandwidth.markdown(result).count("| triton |") == len(bench.LAUNCHES)


def test_floors_are_in_proportion_to_the_bandwidth():
    one = bench.floors([512])[1]
    assert one["launch"] == "update" and one["us on A100 SXM 80GB"] > one["us on H100 SXM"] > one["us on H200 SXM"]


@pytest.mark.gpu
def test_natively_every_way_is_measured_beside_a_copy(monkeypatch):
    monkeypatch.undo()  # at the size of a run, and torch.compile too
    device = torch.device("cuda")
    result = bandwidth.bench(bench.launches([64], device), 3, device)
    assert not result["failures"] and result["copy_bytes_per_second"] > 1e11
    assert all(r["share_of_copy"] > 0 for r in result["rows"])  # above 1 where the cache holds the latents
