"""The kernels' benchmarks: bytes counted against the tensors themselves, equal results, and a turn of each on a CPU."""

import json
from functools import partial

import pytest
import torch

from benchmarks import bandwidth, bench_bn_moments, bench_group_norm_silu, bench_guided_step, bench_soft_kl

pytest.importorskip("triton", reason="the kernels need Triton")

# past a row's end soft_kl's kernel has log 0 - log 0, which the interpreter's numpy mentions
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAUNCHES = {
    "guided_step": partial(bench_guided_step.launches, [2]),
    "soft_kl": partial(bench_soft_kl.launches, [3], [7]),
    "group_norm_silu": partial(bench_group_norm_silu.launches, [(4, 5)], [3]),
    "bn_moments": partial(bench_bn_moments.launches, [3], [(4, 7)]),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench_guided_step, "SHAPE", (4, 48, 8))  # room for its CutMix box
    monkeypatch.setattr(bench_group_norm_silu, "GROUPS", 2)
    monkeypatch.setattr(bandwidth, "compiled", lambda function: function)  # takes a minute; PyTorch's affair


def bytes_of(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))


def again(name, launch, call):
    """Bytes that a second pass, the gradient's, reads once more or leaves for it."""
    if name == "group_norm_silu" and launch.labels["launch"] == "training":
        x, weight, bias, _ = call.args[1:]
        return bytes_of(x, weight, bias) + 2 * (2 * len(x) * bench_group_norm_silu.GROUPS * 4)
    if name == "bn_moments" and launch.labels["launch"] == "gradient":
        return bytes_of(*call.args, *call.keywords["of"])
    return 0


@pytest.mark.parametrize("name", LAUNCHES)
def test_bytes_that_must_move_are_those_of_the_tensors(name):
    for launch in LAUNCHES[name]():
        call = launch.ways(DEVICE)["triton"]
        given, found = [*call.args, *call.keywords.values()], call()
        tensors = [*given, *(found if isinstance(found, tuple) else (found,))]
        if name == "guided_step":
            tensors = [x for x in tensors if isinstance(x, torch.Tensor) and x.dim() >= 4]
        elif name == "soft_kl" and launch.labels["launch"] == "training":
            tensors = [x for x in tensors if isinstance(x, torch.Tensor) and x.dim()]
        assert launch.moved == bytes_of(*tensors) + again(name, launch, call), launch.labels


@pytest.mark.parametrize("name", LAUNCHES)
def test_every_way_computes_the_same(name):
    for launch in LAUNCHES[name]():
        found = {}
        for way in ("triton", "eager", "compile"):
            torch.manual_seed(0)
            result = launch.ways(DEVICE)[way]()
            found[way] = result if isinstance(result, tuple) else (result,)
        # eager rounds between operations too
        rounding = 16 * torch.finfo(getattr(torch, launch.labels.get("dtype", "float32"))).eps
        for way in ("eager", "compile"):
            for mine, theirs in zip(found["triton"], found[way], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=rounding, atol=rounding, check_dtype=False)


@pytest.mark.parametrize(
    "bench, sizes, rows",
    [
        (bench_guided_step, "--batches 2", 3),
        (bench_soft_kl, "--batches 2 --classes 3,10", 8),
        (bench_group_norm_silu, "--batches 1 --maps 4x3", 4),
        (bench_bn_moments, "--batches 2 --maps 3x4,5x1", 8),
    ],
)
def test_a_rehearsal(bench, sizes, rows, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [bench.__name__, "--rehearse", "--repeats", "1", *sizes.split()])
    bench.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not result["failures"] and len(result["rows"]) == 3 * rows == 3 * len(result["floors"])
    assert all(r["ratio"] == 1 for r in result["rows"] if r["way"] == "eager")
    assert bandwidth.markdown(result).count("| triton |") == rows


def test_maps_that_no_tensor_holds_are_left_out():
    found = {
        (launch.labels["channels"], launch.labels["batch"])
        for launch in bench_group_norm_silu.launches([(128, 512), (512, 64)], [4, 64])
    }
    assert found == {(128, 4), (512, 4), (512, 64)}  # 64 images of 128 channels at 512x512 pass 2^31


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it measures")
def test_without_a_gpu_it_says_what_could_not_be_measured(monkeypatch, capsys):
    monkeypatch.setattr(bandwidth, "resources", lambda: [{"kernel": "soft_kl", "sm": 90}])
    monkeypatch.setattr("sys.argv", ["bench_soft_kl", "--batches", "256,512", "--classes", "1000"])
    bench_soft_kl.main()
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert "Not measured: no GPU" in printed.err and "rows" not in result
    few, many = (result["floors"][place]["us on H100 SXM"] for place in (0, 4))
    assert many == pytest.approx(2 * few, rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "launches",
    [
        bench_guided_step.launches([64]),
        bench_soft_kl.launches([65536], [1000]),
        bench_group_norm_silu.launches([(512, 64)], [4]),
        bench_bn_moments.launches([64], [(64, 112)]),
    ],
)
def test_natively_every_way_is_measured_beside_a_copy(launches, monkeypatch):
    monkeypatch.undo()  # at the size of a run, and torch.compile too
    result = bandwidth.bench(launches, 3, DEVICE)
    assert not result["failures"] and result["copy_bytes_per_second"] > 1e11
    assert all(r["share_of_copy"] > 0 for r in result["rows"])  # above 1 where the cache holds the tensors
