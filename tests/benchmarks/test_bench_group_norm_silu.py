"""The benchmark of group normalisation: bytes counted against the tensors themselves, and a turn of it on a CPU."""

import pytest
import torch

from benchmarks import bandwidth
from benchmarks import bench_group_norm_silu as bench

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bandwidth, "CALLS", 1)
    monkeypatch.setattr(bandwidth, "COPY_BYTES", 2**12)
    monkeypatch.setattr(bench, "GROUPS", 2)
    monkeypatch.setattr(bench, "compiled", lambda function: function)  # takes a minute; PyTorch's affair


@pytest.mark.parametrize("launch", bench.LAUNCHES)
def test_bytes_that_must_move_are_those_of_the_tensors(launch, small):
    call = bench.ways_of(launch, 3, 4, 5, "float16", DEVICE)["triton"]
    found = call()
    tensors = [t for t in (*call.args, *(found if launch == "training" else (found,))) if isinstance(t, torch.Tensor)]
    once = sum(t.numel() * t.element_size() for t in tensors)
    # the gradient reads x and the weights again, and the statistics that the forward pass wrote
    again = (3 * 4 * 25 + 2 * 4) * 2 + 2 * (2 * 3 * 2 * 4)
    assert bench.moved(launch, 3, 4, 5, "float16") == once + (again if launch == "training" else 0)


@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_every_way_computes_the_same(dtype, small):
    found = {}
    for way in ("triton", "eager", "compile"):
        torch.manual_seed(0)
        found[way] = bench.ways_of("training", 2, 4, 5, dtype, DEVICE)[way]()
    rounding = 4 * torch.finfo(bench.DTYPES[dtype]).eps  # eager rounds between the two operations too
    for way in ("eager", "compile"):
        for mine, theirs in zip(found["triton"], found[way], strict=True):
            assert mine.stride() == theirs.stride()
            torch.testing.assert_close(mine, theirs, rtol=rounding, atol=4 * rounding)


def test_a_turn(small):
    result = bandwidth.bench(bench.launches([(4, 3)], [1, 2], DEVICE), 1, DEVICE)
    assert not result["failures"] and len(result["rows"]) == 2 * 2 * 2 * 3
    assert all(r["readings"] == 1 for r in result["rows"])
    assert bandwidth.markdown(result).count("| triton |") == 8


def test_maps_that_no_tensor_holds_are_left_out():
    maps = bench.maps_of("128x512,512x64")
    assert maps == [(128, 512), (512, 64)]
    found = {(r["channels"], r["batch"]) for r in bench.floors(maps, [4, 64])}
    assert found == {(128, 4), (512, 4), (512, 64)}  # 64 images of 128 channels at 512x512 pass 2^31
    assert all(r["readings"] == 2 for r in bench.floors(maps, [4]))


@pytest.mark.gpu
def test_natively_every_way_is_measured_beside_a_copy():
    result = bandwidth.bench(bench.launches([(512, 64)], [4], DEVICE), 3, DEVICE)
    assert not result["failures"] and all(0 < r["share_of_copy"] < 1.5 for r in result["rows"])
