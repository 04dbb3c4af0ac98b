"""The benchmark of distillation's steps on networks of milliseconds: its arithmetic, its JSON, its options."""

import argparse
import json

import pytest
import torch

from benchmarks import bench_distill, flops
from benchmarks.bench_distill import WAYS, Pair, accuracies, bench, changes, flop, markdown
from benchmarks.machine import describe
from dfkd.config import DistillConfig
from dfkd.training.world import World
from tests.cli.small_generate import save_classifier

CPU = torch.device("cpu")
SMALL = Pair("resnet8_half", "resnet8_half", 32, 4)


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "SIDES", {"cpu": 64})
        measured = bench(SMALL, CPU, 1, 2, ["eager", "channels_last", "bf16", "fp16", "cuda graph"])
    whole = {"machine": describe(CPU), "turns": 2, "pairs": [measured], "student_accuracy": {"bf16": 0.5}}
    return json.loads(json.dumps(whole))


def test_every_way_is_measured_or_says_why_not(result):
    (part,) = result["pairs"]
    assert part["rows"].keys() == {"eager", "channels_last", "bf16"}
    assert part["failures"].keys() == {"fp16", "cuda graph"} and "for GPUs" in part["failures"]["cuda graph"]
    for row in part["rows"].values():
        assert row["share_of_peak"] is None and row["share_of_matmul"] > 0
    assert part["rows"]["eager"]["ratio"]["median"] == 1
    lines = markdown(result).splitlines()
    assert [line.endswith("| 50.0 % |") for line in lines if "| bf16 |" in line] == [True]
    assert any(line.startswith("- fp16 (resnet8_half to resnet8_half, 32): --amp fp16 on a CPU") for line in lines)


def test_flop_are_two_forward_passes_and_a_backward_one():
    """Backward is a product for the weights and one for the input, which the first convolution has no need of."""
    with torch.no_grad():
        forward = flops.counted(bench_distill.teachers.build("resnet8_half", 10), torch.zeros(4, 3, 32, 32))[1]
    assert 3.8 * forward < flop(SMALL) < 4 * forward


def test_a_line_of_json_follows_every_pair(result, monkeypatch, capsys):
    """Who stops it reads the last one, which is a result with a table."""
    monkeypatch.setattr(bench_distill, "bench", lambda of, *_: {**result["pairs"][0], "pair": vars(of)})
    monkeypatch.setattr("sys.argv", ["bench_distill", "--device", "cpu", "--pairs", *["resnet8:resnet8:32:4"] * 2])
    bench_distill.main()
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(found["pairs"]) for found in told] == [1, 2, 2] and told[1] == told[2]
    assert markdown(told[0]).count("| resnet8 to resnet8, 32 |") == 3


def test_students_get_the_options_of_their_row(monkeypatch, tmp_path):
    """A row that cannot run here has no student."""
    asked = []

    def distill(data, teacher, config, out):
        bench_distill.check(config, World(CPU))
        asked.append((data, config))
        return teacher

    monkeypatch.setattr("dfkd.training.distill.distill", distill)
    monkeypatch.setattr("dfkd.evaluation.evaluate", lambda student, data: argparse.Namespace(accuracy=0.25))
    save_classifier(tmp_path / "teacher")
    found = accuracies(tmp_path, ["eager", "channels_last", "bf16", "fp16", "cuda graph"], CPU, tmp_path)
    assert found == {"channels_last": 0.25, "bf16": 0.25}
    plain = DistillConfig.preset("demo", device="cpu")
    assert asked == [(tmp_path / "synthetic", plain), (tmp_path / "synthetic", plain.replace(amp="bf16"))]


def test_all_ways_of_a_gpu_are_options_that_fit_together():
    for way in WAYS:
        config = DistillConfig.of(student="resnet8", steps=1, **changes(way, torch.device("cuda")))
        bench_distill.check(config, World(torch.device("cuda")))


def test_pairs_are_words():
    assert Pair.of("resnet8:resnet20:32:8") == Pair("resnet8", "resnet20", 32, 8)
    for words, problem in (("resnet8:resnet8", "TEACHER:STUDENT:SIZE:BATCH"), ("resnet9:resnet8:32:8", "resnet9")):
        with pytest.raises(argparse.ArgumentTypeError, match=problem):
            Pair.of(words)
