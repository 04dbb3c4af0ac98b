"""The engines benchmark on a prior of hundredths of a second: its arithmetic, its JSON, its table."""

import json
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from dfkd.cli.generate_options import GenerateOptions
from dfkd.cli.options import parse
from dfkd.compiled.sources import load_sources

from benchmarks import flops
from benchmarks.bench_engines import arguments_parser, bench, markdown, row
from benchmarks.machine import describe
from dfkd.presets import PRESETS
from dfkd_engine.backends import BACKENDS
from tests.cli.small_generate import save_classifier
from tests.synthesis.small_sd import make_small_sd

CPU = torch.device("cpu")
NAMES = ["eager", "channels_last", "inductor", "onnxruntime"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    prior, teacher = make_small_sd(folder / "prior"), save_classifier(folder / "teacher")
    words = ["--preset", "demo", "--device", "cpu", "--out", str(folder)]
    words += ["--prior", str(prior), "--teacher-checkpoint", str(teacher)]
    return load_sources(parse(GenerateOptions, words, "dfkd-generate", PRESETS), ["gradient"])


@pytest.fixture(scope="module")
def result(sources):
    """The decoder at 2 rows, where inductor is said to be unusable, as the JSON gives it back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "SIDES", {"cpu": 64})
        patch.setattr(BACKENDS["inductor"], "unusable", lambda *_: "no compiler | here", raising=False)
        found = bench(sources, ["decode"], NAMES, rows=[2], turns=3)
    return json.loads(json.dumps({"machine": describe(CPU), **found}))


def test_every_way_is_measured_or_says_why_not(result):
    rows = {r["backend"]: r for r in result["rows"]}
    failures = {f["backend"]: f["why"] for f in result["failures"]}
    assert rows.keys() | failures.keys() == set(NAMES) and not rows.keys() & failures.keys()
    assert failures["inductor"] == "no compiler | here"
    assert {"eager", "channels_last"} <= rows.keys()
    if BACKENDS["onnxruntime"].unusable(CPU) is None:
        assert rows["onnxruntime"]["compile_seconds"] > 0, failures
    for found in rows.values():
        assert (found["network"], found["rows"], len(found["turns_ms"])) == ("decode", 2, 3)
        assert found["fastest_ms"] <= found["ms"] <= found["slowest_ms"]
        assert found["flop"] == rows["eager"]["flop"] > 0
        assert 0 < found["relative_error"] < 1e-5
    assert rows["eager"]["compile_seconds"] is None and rows["eager"]["ratio"] == 1


def test_the_table_has_every_row_and_every_reason(result):
    text = markdown(result)
    lines = text.splitlines()
    assert {line.count("|") for line in lines if line.startswith("|")} == {11}
    assert sum(line.startswith("| decode | 2 |") for line in lines) == len(result["rows"])
    assert "- inductor (decode): no compiler | here" in lines
    assert result["machine"]["date"] in text


def test_a_gradient_counts_its_backward_pass_and_its_error(sources, monkeypatch):
    monkeypatch.setattr(flops, "SIDES", {"cpu": 64})
    found = bench(sources, ["decode", "image_moments", "gradient"], ["channels_last"], rows=[2, 4], turns=1)
    assert not found["failures"]
    flop = {(r["network"], r["rows"]): r["flop"] for r in found["rows"]}
    forward = flop["decode", 2] + flop["image_moments", 2]  # all but the last, linear layer
    assert 2 * forward < flop["gradient", 2] < 2.1 * forward
    assert flop["gradient", 4] == 2 * flop["gradient", 2]
    assert all(r["ratio"] is None for r in found["rows"])
    assert all(r["relative_error"] is None or r["relative_error"] < 1e-4 for r in found["rows"])
    assert found["matmul_flop_per_second"]["float32"] > 0


def test_a_network_that_fails_takes_no_other_along(sources, monkeypatch):
    monkeypatch.setattr(flops, "SIDES", {"cpu": 64})
    networks, told = ["pixel_gradient", "decode"], []
    found = bench(
        replace(sources, teacher=None), networks, ["eager"], rows=[2], turns=1,
        so_far=lambda found: told.append([len(found[name]) for name in ("failures", "rows", "matmul_flop_per_second")]),
    )  # fmt: skip
    assert told[0] == [1, 0, 0] and told[1][:2] == [1, 1] and told[1][2] == len(found["matmul_flop_per_second"]) > 0
    assert [(f["network"], f["backend"]) for f in found["failures"]] == [("pixel_gradient", "all")]
    assert [r["network"] for r in found["rows"]] == ["decode"]


def test_ratios_and_shares_are_taken_within_turns():
    # a machine that halves its speed from turn to turn, whatever runs on it
    slowdown = [1, 2, 4]
    found = row([s * 0.1 for s in slowdown], [s * 0.3 for s in slowdown], 1e6, [2e7 / s for s in slowdown])
    assert found["ratio"] == pytest.approx(3) and found["share_of_matmul"] == pytest.approx(0.5)
    assert (found["fastest_ms"], found["ms"], found["slowest_ms"]) == pytest.approx((100, 200, 400))
    assert row([0.1], None, 1.0, [1.0])["ratio"] is None


def test_ways_go_in_turns_and_a_failure_takes_no_other_along():
    log = []

    def fails():
        log.append("b")
        raise MemoryError("too large\nmore words")

    calls = {"a": lambda: log.append("a"), "b": fails, "c": lambda: time.sleep(0.001) or log.append("c")}
    seconds, failed = flops.in_turns(calls, 2, CPU)
    assert "".join(log) == "abc" + "ca" + "ca"  # the first turn is not counted; another way begins each
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "c": 2}
    assert failed == {"b": "MemoryError: too large"}


def test_flop_of_a_convolution_and_its_input_gradient():
    weight, x = torch.randn(8, 3, 3, 3), torch.randn(2, 3, 10, 10)
    forward = 2 * (2 * 8 * 10 * 10) * (3 * 3 * 3)
    assert flops.counted(partial(F.conv2d, weight=weight, padding=1), x)[1] == forward

    def gradient(x):
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(F.conv2d(leaf, weight, padding=1).sum(), leaf)

    (found,), flop = flops.counted(gradient, x)
    assert flop == 2 * forward and found.shape == x.shape


def test_flop_of_attention_are_seen():
    q = torch.randn(2, 4, 16, 8)
    _, flop = flops.counted(F.scaled_dot_product_attention, q, q, q)
    assert flop == 2 * (2 * 2 * 4 * 16 * 16 * 8)


def test_the_ceiling_is_in_the_networks_precision(monkeypatch):
    monkeypatch.setattr(flops, "SIDES", {"cpu": 8})
    assert list(flops.matmuls(CPU, torch.float32)) == ["float32"]
    found = flops.matmuls(CPU, torch.bfloat16)
    assert list(found) == ["float32", "bfloat16"]
    call, flop = found["bfloat16"]
    assert call().dtype == torch.bfloat16 and flop == 2 * 8**3


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--backends", "eager,tensorflow"], "unknown 'tensorflow'"),
        (["--networks", "vae"], "unknown 'vae'"),
        (["--rows", "1,25"], "2 rows or more"),
    ],
)
def test_wrong_words_are_refused(words, problem, capsys):
    with pytest.raises(SystemExit):
        arguments_parser().parse_args(words)
    assert problem in capsys.readouterr().err
