"""The engines benchmark on networks of milliseconds: what is measured, and the arithmetic of timing in turns."""

import json
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from benchmarks import flops
from benchmarks.bench_engines import arguments_parser, bench, contiguous, markdown, row
from benchmarks.machine import describe
from dfkd_engine.backends import BACKENDS
from tests.synthesis.small_networks import pipeline

CPU = torch.device("cpu")
NAMES = ["eager", "channels_last", "inductor", "onnxruntime"]


@pytest.fixture(autouse=True)
def small_matmuls(monkeypatch):
    monkeypatch.setattr(flops, "SIDES", {"cpu": 64})


def measured(networks, names, rows, turns=1):
    (*_, result) = bench(pipeline(refine_steps=1), networks, names, rows, turns)
    return result


def test_every_way_is_measured_or_says_why_not(monkeypatch):
    monkeypatch.setattr(BACKENDS["inductor"], "unusable", lambda *_: "no compiler | here", raising=False)
    result = json.loads(json.dumps({"machine": describe(CPU), **measured(["decode"], NAMES, [2], 3)}))
    rows = {r["backend"]: r for r in result["rows"]}
    failures = {f["backend"]: f["why"] for f in result["failures"]}
    assert rows.keys() | failures.keys() == set(NAMES) and not rows.keys() & failures.keys()
    assert failures["inductor"] == "no compiler | here"
    if BACKENDS["onnxruntime"].unusable(CPU) is None:
        assert rows["onnxruntime"]["compile_seconds"] > 0, failures
    for found in rows.values():
        assert found["ms"]["min"] <= found["ms"]["median"] <= found["ms"]["max"]
        assert found["flop"] == rows["eager"]["flop"] > 0 and 0 < found["relative_error"] < 1e-5
    assert rows["eager"]["compile_seconds"] is None and rows["eager"]["ratio"]["median"] == 1
    lines = markdown(result).splitlines()
    assert sum(line.startswith("| decode | 2 |") for line in lines) == len(rows)
    assert "- inductor (decode): no compiler | here" in lines


def test_a_gradient_counts_its_backward_pass_and_its_error():
    found = measured(["decode", "gradient"], ["channels_last"], [2, 4])
    assert not found["failures"] and found["matmul_flop_per_second"]["float32"] > 0
    flop = {(r["network"], r["rows"]): r["flop"] for r in found["rows"]}
    assert flop["gradient", 2] > 2 * flop["decode", 2] and flop["gradient", 4] == 2 * flop["gradient", 2]
    assert all(r["ratio"] is None and r["relative_error"] < 1e-4 for r in found["rows"])


def test_a_network_that_fails_takes_no_other_along():
    """A result follows every network, for who stops it."""
    results = bench(pipeline(), ["pixel_gradient", "decode"], ["eager"], [2], 1)  # these settings refine no pixels
    told = [(len(found["failures"]), len(found["rows"])) for found in results]
    assert told == [(1, 0), (1, 1)]


def test_eager_has_copies_of_the_networks_in_the_order_of_nchw():
    pipe = pipeline()
    for network in (pipe.prior.unet, pipe.prior.vae):
        network.to(memory_format=torch.channels_last)
    own = contiguous(pipe)
    z = torch.randn(2, 2, 4, 4)
    for made, as_it_was in ((own, True), (pipe, False)):
        assert all(weight.is_contiguous() for weight in made.prior.vae.parameters()) is as_it_was
    ours, theirs = (p.functions()[1].call(z)[0] for p in (pipe, own))
    torch.testing.assert_close(ours, theirs)
    assert next(own.guidance.teacher.parameters()) is next(own.teacher.parameters())


def test_ratios_and_shares_are_taken_within_turns():
    # a machine that halves its speed from turn to turn, whatever runs on it
    slowdown = [1, 2, 4]
    found = row([s * 0.1 for s in slowdown], [s * 0.3 for s in slowdown], 1e6, [2e7 / s for s in slowdown])
    assert found["ratio"] == pytest.approx({"median": 3, "min": 3, "max": 3})
    assert found["share_of_matmul"] == pytest.approx(0.5)
    assert found["ms"] == pytest.approx({"median": 200, "min": 100, "max": 400})
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


def test_flop_of_a_convolution_its_input_gradient_and_of_attention():
    weight, x = torch.randn(8, 3, 3, 3), torch.randn(2, 3, 10, 10)
    forward = 2 * (2 * 8 * 10 * 10) * (3 * 3 * 3)
    assert flops.counted(partial(F.conv2d, weight=weight, padding=1), x)[1] == forward

    def gradient(x):
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(F.conv2d(leaf, weight, padding=1).sum(), leaf)

    (found,), flop = flops.counted(gradient, x)
    assert flop == 2 * forward and found.shape == x.shape
    q = torch.randn(2, 4, 16, 8)
    assert flops.counted(F.scaled_dot_product_attention, q, q, q)[1] == 2 * (2 * 2 * 4 * 16 * 16 * 8)


def test_the_ceiling_is_in_the_networks_precision():
    assert list(flops.matmuls(CPU, torch.float32)) == ["float32"]
    found = flops.matmuls(CPU, torch.bfloat16)
    assert list(found) == ["float32", "bfloat16"]
    call, flop = found["bfloat16"]
    assert call().dtype == torch.bfloat16 and flop == 2 * 64**3


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
