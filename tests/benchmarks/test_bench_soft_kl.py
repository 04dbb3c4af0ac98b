"""The benchmark of distillation's loss: bytes counted against the tensors themselves, and a turn of it on a CPU."""

import os
from itertools import product

import pytest
import torch

from benchmarks import bandwidth
from benchmarks import bench_soft_kl as bench

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bandwidth, "CALLS", 1)
    monkeypatch.setattr(bandwidth, "COPY_BYTES", 2**12)
    monkeypatch.setattr(
        bench, "compiled", lambda function: function
    )  # takes a minute; its results are PyTorch's affair


@pytest.mark.parametrize("launch, dtype", list(product(bench.LAUNCHES, bench.DTYPES)))
def test_bytes_that_must_move_are_those_of_the_tensors(launch, dtype, small):
    call = bench.ways_of(launch, 3, 7, dtype, DEVICE)["triton"]
    tensors = [x for x in (*call.args, *call()) if isinstance(x, torch.Tensor) and x.dim()]
    assert bench.moved(launch, 3, 7, dtype) == sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("launch, dtype", list(product(bench.LAUNCHES, bench.DTYPES)))
def test_every_way_computes_the_same(launch, dtype, small):
    torch.manual_seed(0)
    found = {}
    for way in ("triton", "eager", "compile"):
        torch.manual_seed(0)
        found[way] = [x.float() for x in bench.ways_of(launch, 3, 7, dtype, DEVICE)[way]()]
    rounding = 4 * torch.finfo(bench.DTYPES[dtype]).eps  # of gradients around 1
    for way in ("eager", "compile"):
        for mine, theirs in zip(found["triton"], found[way], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=rounding)


def test_a_turn(small):
    result = bandwidth.bench(bench.launches([2], [3, 10], DEVICE), 1, DEVICE)
    assert not result["failures"] and len(result["rows"]) == 2 * 2 * 2 * 3
    assert all(r["ratio"] == 1 for r in result["rows"] if r["way"] == "eager")
    assert bandwidth.markdown(result).count("| triton |") == 8


def test_floors_are_in_proportion_to_the_bytes():
    few, many = (bench.floors([batch], [1000])[0] for batch in (256, 512))
    assert many["us on H100 SXM"] == pytest.approx(2 * few["us on H100 SXM"], rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it measures")
def test_without_a_gpu_it_says_what_could_not_be_measured(monkeypatch, capsys):
    monkeypatch.setattr(bandwidth, "resources", lambda: [{"kernel": "soft_kl", "sm": 90}])
    monkeypatch.setattr("sys.argv", ["bench_soft_kl", "--batches", "256", "--classes", "10,1000"])
    bench.main()
    printed = capsys.readouterr()
    assert "Not measured: no GPU" in printed.err and '"rows": [' not in printed.out


@pytest.mark.gpu
def test_natively_every_way_is_measured_beside_a_copy():
    """torch.compile too; and past the cache, where eager goes over the logits many times, one pass is quicker."""
    assert os.environ.get("TRITON_INTERPRET") != "1"
    result = bandwidth.bench(bench.launches([65536], [1000], DEVICE), 3, DEVICE)
    assert not result["failures"] and result["copy_bytes_per_second"] > 1e11
    assert all(0 < r["share_of_copy"] < 1.5 for r in result["rows"])
    assert all(r["ratio"] > 1 for r in result["rows"] if r["way"] == "triton")
