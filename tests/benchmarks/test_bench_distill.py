"""The benchmark of distillation's steps on networks of milliseconds: its arithmetic, its JSON, its table."""

import argparse
import json

import pytest
import torch

from benchmarks import bench_distill, flops
from benchmarks.bench_distill import Pair, accuracies, arguments_parser, bench, flop, markdown, pair, ways
from benchmarks.machine import describe

CPU = torch.device("cpu")
SMALL = Pair("resnet8_half", "resnet8_half", 32, 4)
NAMES = ["eager", "channels_last", "bf16", "fp16", "cuda graph", "cached logits"]


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "SIDES", {"cpu": 64})
        measured = bench(SMALL, CPU, 1, 2, NAMES)
    whole = {"machine": describe(CPU), "turns": 2, "pairs": [measured], "student_accuracy": {"bf16": 0.5}}
    return json.loads(json.dumps(whole))


def test_every_way_is_measured_or_says_why_not(result):
    (part,) = result["pairs"]
    assert part["rows"].keys() == {"eager", "channels_last", "bf16", "cached logits"}
    assert (
        part["failures"].keys() == {"fp16", "cuda graph"}
        and "CUDA graphs are for GPUs" in part["failures"]["cuda graph"]
    )
    for row in part["rows"].values():
        assert 0 < row["slowest"] <= row["images_per_second"] <= row["fastest"]
        assert row["share_of_peak"] is None and row["share_of_matmul"] > 0
    assert part["rows"]["eager"]["ratio"] == 1


def test_flop_are_two_forward_passes_and_a_backward_one():
    """Backward is a product for the weights and one for the input, which the first convolution has no need of."""
    with torch.no_grad():
        forward = flops.counted(bench_distill.teachers.build("resnet8_half", 10), torch.zeros(4, 3, 32, 32))[1]
    whole, cached = flop(SMALL, False), flop(SMALL, True)
    assert whole - cached == forward
    assert 2.8 * forward < cached < 3 * forward


def test_the_table_has_every_row_accuracy_and_reason(result):
    lines = markdown(result).splitlines()
    assert {line.count("|") for line in lines if line.startswith("|")} == {9}
    assert sum(line.startswith("| resnet8_half to resnet8_half, 32 |") for line in lines) == 4
    assert [line.endswith("| 50.0 % |") for line in lines if "| bf16 |" in line] == [True]
    assert any(line.startswith("- fp16 (resnet8_half to resnet8_half, 32): --amp fp16 on a CPU") for line in lines)


def test_a_line_of_json_follows_every_pair(result, monkeypatch, capsys):
    """Who stops it reads the last one, which is a result with a table."""
    monkeypatch.setattr(bench_distill, "bench", lambda of, *_: {**result["pairs"][0], "pair": vars(of)})
    monkeypatch.setattr("sys.argv", ["bench_distill", "--device", "cpu", "--pairs", *["resnet8:resnet8:32:4"] * 2])
    bench_distill.main()
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(found["pairs"]) for found in told] == [1, 2, 2] and told[1] == told[2]
    assert markdown(told[0]).count("| resnet8 to resnet8, 32 |") == 4


def test_students_get_the_options_of_their_row(monkeypatch, tmp_path):
    called = []

    def call(command, *words):
        called.append((command, [str(word) for word in words]))
        return {"accuracy": 0.25}

    monkeypatch.setattr(bench_distill, "call", call)
    a = arguments_parser().parse_args(["--teacher", "t", "--ways", "eager,channels_last,fp16,cached logits,compile"])
    assert accuracies(a, CPU, tmp_path) == {"channels_last": 0.25, "compile": 0.25, "cached logits": 0.25}
    assert [command for command, _ in called] == ["dfkd-generate", "dfkd-distill", "dfkd-distill", "dfkd-distill"]
    assert called[2][1][-2:] == ["--compile", "default"]
    assert called[3][1][-6:] == ["--augment", "none", "--mix", "none", "--cache-logits", "on"]


def test_all_ways_of_a_gpu_are_options_that_fit_together():
    from dfkd.training.cuda_graph import check_cuda_graph
    from dfkd.training.settings import DistillSettings

    for way in ways(torch.device("cuda")).values():
        check_cuda_graph(DistillSettings(**{"augment": "none", **way.changes}), torch.device("cuda"), 1)


def test_wrong_words_are_refused(capsys):
    with pytest.raises(argparse.ArgumentTypeError, match="TEACHER:STUDENT:SIZE:BATCH"):
        pair("resnet8:resnet8")
    with pytest.raises(argparse.ArgumentTypeError, match="resnet9"):
        pair("resnet9:resnet8:32:8")
    with pytest.raises(SystemExit):
        arguments_parser().parse_args(["--ways", "eager,magic"])
    assert "unknown 'magic'" in capsys.readouterr().err
