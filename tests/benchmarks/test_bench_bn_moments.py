"""The benchmark of the BatchNorm tap: bytes counted against the tensors themselves, and a turn of it on a CPU."""

import os
from itertools import product

import pytest
import torch

from benchmarks import bandwidth
from benchmarks import bench_batch_norm_tap as bench

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bandwidth, "CALLS", 1)
    monkeypatch.setattr(bandwidth, "COPY_BYTES", 2**12)
    # takes a minute; its results are PyTorch's affair
    monkeypatch.setattr(bench, "compiled", lambda function: function)


@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_bytes_that_must_move_are_those_of_the_tensors(dtype, small):
    def bytes_of(*tensors):
        return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))

    forward = bench.ways_of("forward", 3, (4, 7), dtype, DEVICE)["triton"]
    assert bench.moved("forward", 3, (4, 7), dtype) == bytes_of(*forward.args, *forward())
    gradient = bench.ways_of("gradient", 3, (4, 7), dtype, DEVICE)["triton"]
    function, x, *layer = gradient.args
    assert function is bench.batch_norm_tap
    twice = bytes_of(x, *layer) * 2 + bytes_of(*gradient.keywords["of"], *gradient())
    assert bench.moved("gradient", 3, (4, 7), dtype) == twice


@pytest.mark.parametrize("launch, dtype", list(product(bench.LAUNCHES, bench.DTYPES)))
def test_every_way_computes_the_same(launch, dtype, small):
    found = {}
    for way in ("triton", "eager", "compile"):
        torch.manual_seed(0)
        found[way] = [x.float() for x in bench.ways_of(launch, 3, (4, 7), dtype, DEVICE)[way]()]
    assert len(found["triton"]) == (3 if launch == "forward" else 4)
    # eager rounds y, and the two gradients before it adds them
    rounding = 8 * torch.finfo(bench.DTYPES[dtype]).eps
    for way in ("eager", "compile"):
        for mine, theirs in zip(found["triton"], found[way], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=rounding, atol=rounding)


def test_a_turn(small):
    result = bandwidth.bench(bench.launches([2], bench.maps_of("3x4,5x1"), DEVICE), 1, DEVICE)
    assert not result["failures"] and len(result["rows"]) == 2 * 2 * 2 * 3
    assert all(r["ratio"] == 1 for r in result["rows"] if r["way"] == "eager")
    assert bandwidth.markdown(result).count("| triton |") == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it measures")
def test_without_a_gpu_it_says_what_could_not_be_measured(monkeypatch, capsys):
    monkeypatch.setattr(bandwidth, "resources", lambda: [{"kernel": "batch_norm_tap", "sm": 90}])
    monkeypatch.setattr("sys.argv", ["bench_batch_norm_tap", "--batches", "16", "--maps", "64x112,16x32"])
    bench.main()
    printed = capsys.readouterr()
    assert "Not measured: no GPU" in printed.err and '"rows": [' not in printed.out
    assert printed.err.count("| 16 | 64 | 112 |") == 4


@pytest.mark.gpu
def test_natively_every_way_is_measured_beside_a_copy():
    """torch.compile too; and past the cache, where eager reads the map many times, one pass is quicker."""
    assert os.environ.get("TRITON_INTERPRET") != "1"
    result = bandwidth.bench(bench.launches([64], [(64, 112)], DEVICE), 3, DEVICE)
    assert not result["failures"] and result["copy_bytes_per_second"] > 1e11
    assert all(0 < r["share_of_copy"] < 1.5 for r in result["rows"])
    assert all(r["ratio"] > 1 for r in result["rows"] if r["way"] == "triton")
