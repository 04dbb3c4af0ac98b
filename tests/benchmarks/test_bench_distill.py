"""The benchmark of distillation's steps on networks of milliseconds: its rows, its FLOP, its options."""

import argparse
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_distill, flops
from benchmarks.bench_distill import WAYS, Pair, accuracies, changes, flop, groups
from dfkd.config import DistillConfig
from dfkd.errors import UsageError
from dfkd.training.world import World
from tests.cli.small_generate import save_classifier

CPU = torch.device("cpu")
SMALL = Pair("resnet8_half", "resnet8_half", 32, 4)


def test_every_way_makes_a_step_or_says_why_not():
    first, second = groups([SMALL, replace(SMALL, batch=2)], CPU, students={"bf16": 0.5})
    for way in ("eager", "channels_last", "bf16"):
        work = first.rows[way]()
        assert work.call().isfinite() and (work.amount, work.flop) == (4, flop(SMALL))
        assert work.facts == ({"student": "50.0 %"} if way == "bf16" else {})
    assert second.rows["bf16"]().facts == {}, "the students are the first pair's"
    for way in ("fp16", "cuda graph"):
        with pytest.raises(UsageError, match="for GPUs"):
            first.rows[way]()


def test_flop_are_two_forward_passes_and_a_backward_one():
    """Backward is a product for the weights and one for the input, which the first convolution has no need of."""
    with torch.no_grad():
        forward = flops.counted(bench_distill.teachers.build("resnet8_half", 10), torch.zeros(4, 3, 32, 32))[1]
    assert 3.8 * forward < flop(SMALL) < 4 * forward


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
    plain = DistillConfig.preset("demo", optimiser="sgd", lr=0.2, device="cpu")
    assert asked == [(tmp_path / "synthetic", plain), (tmp_path / "synthetic", plain.replace(amp="bf16"))]


def test_all_ways_of_a_gpu_are_options_that_fit_together(monkeypatch):
    monkeypatch.setattr("dfkd.training.step.try_compiler", lambda mode, device: None)  # there need not be a GPU
    for way in WAYS:
        config = DistillConfig.of(student="resnet8", steps=1, **changes(way, torch.device("cuda")))
        bench_distill.check(config, World(torch.device("cuda")))


def test_pairs_are_words():
    assert Pair.of("resnet8:resnet20:32:8") == Pair("resnet8", "resnet20", 32, 8)
    for words, problem in (("resnet8:resnet8", "TEACHER:STUDENT:SIZE:BATCH"), ("resnet9:resnet8:32:8", "resnet9")):
        with pytest.raises(argparse.ArgumentTypeError, match=problem):
            Pair.of(words)
