"""The loop of all benchmarks: turns, ratios within a turn, what fails, the columns of the table; and counted FLOP."""

import json
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from benchmarks import driver, flops
from benchmarks.driver import Group, Work, markdown, measure, repeats
from benchmarks.machine import describe
from dfkd.errors import UsageError

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Calls take the seconds that they return, and a machine may get slower from call to call."""
    machine = {"slower": 1.0, "speed": 1.0}

    def timed(call, device):
        seconds = call() * machine["speed"]
        machine["speed"] *= machine["slower"]
        return seconds

    monkeypatch.setattr(flops, "timed", timed)
    monkeypatch.setattr(flops, "PAUSE", 0.0)
    monkeypatch.setattr(driver, "repeated", lambda call, times: lambda: times * call())
    return machine


def takes(seconds, amount=1.0, flop=0.0, **facts):
    return lambda: Work(lambda: seconds, amount, flop, facts)


def absent():
    raise UsageError("no such device")


def breaks():
    return Work(lambda: 1 / 0)


def result_of(groups, turns=3, passes=1):
    (*_, found) = measure(groups, CPU, turns, passes)
    return json.loads(json.dumps({"machine": describe(CPU), "command": "python x", "note": "", **found}))


def test_a_row_is_compared_amount_for_amount(clock):
    rows = {"plain": takes(0.002), "grouped": takes(0.016, 32), "gpu": absent, "broken": breaks}
    found = result_of([Group("sort", "plain", rows, "bytes")])
    plain, grouped = found["rows"]
    assert (plain["baseline"], grouped["baseline"]) == (True, False)
    assert grouped["ratio"] == pytest.approx({"median": 4, "min": 4, "max": 4})
    assert grouped["ms"]["median"] == pytest.approx(16) and grouped["per_second"]["median"] == pytest.approx(2000)
    whys = {"gpu": "no such device.", "broken": "ZeroDivisionError: division by zero"}
    assert found["failures"] == [{"group": "sort", "name": name, "why": why} for name, why in whys.items()]
    lines = markdown(found).splitlines()
    assert lines[2:4] == [
        "| sort | plain | 2.00 (2.00 to 2.00) | 500 B | baseline |",
        "| sort | grouped | 16.0 (16.0 to 16.0) | 2.00 kB | 4.00 (4.00 to 4.00) |",
    ]
    assert lines[-2:] == [f"- sort: {name}: {why}" for name, why in whys.items()]


def test_ratios_are_taken_within_turns(clock):
    """A machine that slows down by a thousandth a call, whatever runs on it, moves the times and hardly a ratio."""
    clock["slower"] = 1.001
    found = result_of([Group("sum", "plain", {"plain": takes(2.0), "ours": takes(0.5)})], turns=200)
    ours = found["rows"][1]
    assert ours["ms"]["max"] > 1.4 * ours["ms"]["min"] and ours["ratio"]["max"] < 1.01 * ours["ratio"]["min"]


def test_flop_are_shares_of_a_matmul_and_facts_are_columns(clock, monkeypatch):
    monkeypatch.setattr(flops, "matmul", lambda device, dtype: (lambda: 0.5, 10))
    rows = {"plain": takes(1.0, flop=4), "compiled": takes(0.5, flop=4, **{"compile s": 12.3, "error": 1.5e-7})}
    found = result_of([Group("net", "plain", rows, dtype=torch.float32)])
    assert [r["share_of_matmul"] for r in found["rows"]] == [0.2, 0.4] and found["rows"][1]["flop_per_second"] == 8
    assert found["rows"][0]["mfu"] is None, "a CPU has no data sheet here"
    head, _, plain, compiled, *_ = markdown(found).splitlines()
    assert head.endswith("| ratio | FLOP/s | of matmul | compile s | error |") and "MFU" not in head
    assert plain.endswith("| 20 % | - | - |") and compiled.endswith("| 40 % | 12.3 | 1.5e-07 |")


def test_every_row_is_made_anew_in_every_pass_and_told_after_every_group(clock):
    made = []

    def make(name):
        made.append(name)
        return Work(lambda: 1.0)

    groups = [Group(name, "plain", {"plain": partial(make, name)}) for name in ("a", "b")]
    told = list(measure(groups, CPU, turns=2, passes=2))
    assert made == ["a", "b", "a", "b"] and [len(found["rows"]) for found in told] == [1, 2, 2, 2]
    assert told[-1]["turns"] == 4


def test_small_calls_are_repeated_until_a_clock_sees_them(monkeypatch):
    seconds = iter((5.0, 0.1, 0.003, 0.004))  # the first compiles, the second waits for another process
    monkeypatch.setattr(flops, "timed", lambda call, device: next(seconds))
    assert repeats(lambda: None, CPU, 0.02) == 7
    monkeypatch.setattr(flops, "timed", lambda call, device: 3.0)
    assert repeats(lambda: None, CPU, 0.02) == 1


def test_who_begins_goes_round_and_a_failure_takes_no_other_along():
    log = []

    def fails():
        log.append("b")
        raise MemoryError("too large\nmore words")

    calls = {"a": lambda: log.append("a"), "b": fails, "c": lambda: time.sleep(0.001) or log.append("c")}
    seconds, failed = flops.in_turns(calls, 2, CPU)
    assert "".join(log) == "abc" + "ca" + "ca"  # the first turn is not counted
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


def test_the_ceiling_is_in_the_networks_precision(monkeypatch):
    monkeypatch.setattr(flops, "SIDES", {"cpu": 8})
    call, flop = flops.matmul(CPU, torch.bfloat16)
    assert call().dtype == torch.bfloat16 and flop == 2 * 8**3
