"""`make bench`: every row of the quick suite can be made, and what differs between two results is named."""

import copy
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import bench_guided_step, bench_parts, driver, suite
from benchmarks.driver import Group, Work
from benchmarks.suite import compare
from dfkd.errors import UsageError
from dfkd.training.losses import kl_at_temperature
from dfkd_kernels.guided_step import guided_step_ref

CPU = torch.device("cpu")


def result_of(suite="full", **ratios):
    rows = [
        {"group": "g", "name": name, "baseline": name == "plain", "ratio": dict(zip(("min", "median", "max"), r))}  # noqa: B905
        for name, r in {"plain": (1, 1, 1), **ratios}.items()
    ]
    return {"suite": suite, "machine": {"device": "a CPU"}, "rows": rows}


def test_the_slowest_change_comes_first_and_overlapping_spreads_are_no_change():
    before = result_of(a=(1, 1.1, 1.2), b=(2, 2, 2), c=(1, 1, 1), d=(1, 1, 1), e=(1, 1, 1))
    after = result_of(a=(0.9, 0.95, 1.0), b=(1, 1, 1), c=(1.5, 1.5, 1.5), d=(0.9, 0.9, 0.9), f=(1, 1, 1))
    lines, differ = compare(before, after)
    assert differ and lines == [
        "g: b is slower: ratio 2.00 (2.00 to 2.00) before, 1.00 (1.00 to 1.00) now",
        "g: d is slower: ratio 1.00 (1.00 to 1.00) before, 0.900 (0.900 to 0.900) now",
        "g: c is faster: ratio 1.00 (1.00 to 1.00) before, 1.50 (1.50 to 1.50) now",
        "only before: g: e",
        "only now: g: f",
        "3 of 4 rows differ",
    ]
    assert compare(before, copy.deepcopy(before)) == (["0 of 5 rows differ"], False)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the suite on one group of seconds that are told; gives the exit status and what was said."""

    def run(*words, ours=0.5):
        rows = {"plain": lambda: Work(lambda: 2.0), "ours": lambda: Work(lambda: ours)}
        monkeypatch.setattr(suite, "groups", lambda *_: [Group("sum", "plain", rows), Group("sort", "plain", rows)])
        monkeypatch.setattr(driver.flops, "timed", lambda call, device: call())
        monkeypatch.setattr(driver, "repeated", lambda call, times: lambda: times * call())
        monkeypatch.setattr("benchmarks.recording.RESULTS", tmp_path)
        monkeypatch.setattr("sys.argv", ["suite", "--quick", "--device", "cpu", *map(str, words)])
        try:
            suite.main()
            status = 0
        except SystemExit as done:
            status = done.code
        return status, capsys.readouterr()

    return run


def test_a_slowed_row_is_named_and_ends_with_1(command, tmp_path):
    assert command("--json", tmp_path / "before.json")[0] == 0
    status, said = command("--against", tmp_path / "before.json", "--only", "sum", ours=0.8)
    assert status == 1 and "sum: ours is slower: ratio 4.00 (4.00 to 4.00) before, 2.50" in said.err
    assert command("--read", tmp_path / "before.json", "--against", tmp_path / "before.json")[0] == 0


def test_the_whole_suite_alone_is_recorded(command, tmp_path):
    status, said = command("--record", "--only", "sum")
    assert status == 2 and "--record is of the whole suite" in said.err and not list(tmp_path.iterdir())
    assert command("--record")[0] == 0
    recorded = json.loads((tmp_path / "suite-cpu.json").read_text())
    assert recorded["suite"] == "quick" and recorded["turns"] == suite.PASSES * suite.TURNS["quick"]
    assert [(r["group"], r["name"]) for r in recorded["rows"][:2]] == [("sum", "plain"), ("sum", "ours")]


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "No such file"), ("[]", "is no result of the suite"), (json.dumps(result_of()), "is of the full suite")],
)
def test_what_cannot_be_compared_is_said_before_anything_runs(command, tmp_path, content, problem):
    if content is not None:
        (tmp_path / "other.json").write_text(content)
    status, said = command("--against", tmp_path / "other.json", ours=None)  # a call would fail
    assert status and problem in said.err + str(status)


@pytest.mark.parametrize("quick", [True, False])
def test_every_group_has_its_baseline_and_a_name_of_its_own(quick, tmp_path):
    found = suite.groups(CPU, quick, tmp_path)
    assert all(group.baseline == next(iter(group.rows)) and len(group.rows) > 1 for group in found)
    assert len({group.name for group in found}) == len(found)


def test_rows_of_the_parts_can_be_made(tmp_path):
    """And none in Triton without a GPU. The other benchmarks' rows have tests of their own."""
    for group in bench_parts.groups(CPU, tmp_path):
        for name, make in group.rows.items():
            if name == "triton":
                with pytest.raises(UsageError, match="no CUDA device"):
                    make()
            else:
                work = make()
                work.call()
                assert work.amount > 1


def test_what_one_would_write_does_what_ours_does():
    found = []
    for step in (bench_parts.plain_guided_step, guided_step_ref):
        torch.manual_seed(0)
        found.append(bench_guided_step.calls_of({"": step}, "guided", 2, CPU, torch.float32)[""]())
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours)
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    theirs = bench_parts.plain_soft_kl(student, teacher, 4.0)
    torch.testing.assert_close(theirs, kl_at_temperature(student, teacher, 4.0))


def test_make_bench_is_the_suite():
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "ARGS"}
    root = Path(suite.__file__).parents[1]
    listed = subprocess.run(["make", "-n", "bench", "ARGS=--quick"], cwd=root, env=env, capture_output=True, text=True)
    assert listed.stdout.splitlines()[-1].endswith("-m benchmarks.suite --quick")
