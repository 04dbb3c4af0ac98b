"""The benchmark suite: its pairs, its options on a suite of two groups with a clock of its own, its list of rows."""

import copy
import importlib
import itertools
import json
import os
import subprocess
import sys
import tomllib

import pytest
import torch

from benchmarks import bench_guided_step, flops
from benchmarks.suite import bench_loaders, compare, conftest, plain, session
from benchmarks.suite.case import Absent, Case, Group, Place, Work, cases
from benchmarks.suite.session import Rounds, markdown, repeats
from dfkd.training.losses import kl_at_temperature
from dfkd_kernels.guided_step import guided_step_ref

CPU = torch.device("cpu")
ROOT = conftest.SUITE.parents[1]
FILES = sorted(conftest.SUITE.glob("bench_*.py"))
NUMBER = itertools.count()
FAKE = """
from benchmarks import flops
from benchmarks.suite.case import Absent, Group, Work

def takes(seconds, amount=1):
    def call():
        flops.SPENT[0] += seconds
    return lambda place: Work(call, amount)

def absent(place):
    raise Absent("no such device")

def groups(device, quick):
    return [
        Group("sum", "plain", {"ours": takes(OURS), "other": takes(1.0), "gpu": absent, "plain": takes(2.0)}, "images"),
        Group("sort", "alone", {"alone": takes(0.002), "grouped": takes(0.016, 32)}, "bytes"),
    ]

def test_fake(paired):
    paired()
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Runs a suite of two groups with these options, one row of which takes `ours` seconds; gives the exit status."""
    spent, ran = [0.0], []

    def timed(call, device):
        before = spent[0]
        ran.append(call())
        return spent[0] - before

    for name in (
        "PYTEST_XDIST_WORKER",
        "PYTEST_XDIST_WORKER_COUNT",
    ):  # this process may be one of several; that one not
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(flops, "SPENT", spent, raising=False)
    monkeypatch.setattr(flops, "timed", timed)
    monkeypatch.setattr(flops, "PAUSE", 0.0)
    monkeypatch.setattr(conftest, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()

    def run(*options, ours=0.5):
        ran.clear()
        file = tmp_path / f"bench_fake_{next(NUMBER)}.py"  # a module is read once by its name
        file.write_text(FAKE.replace("OURS", str(ours)))
        monkeypatch.setattr(conftest, "SUITE", file)
        own = ["-p", "benchmarks.suite.conftest", "-p", "no:cacheprovider", "--import-mode=importlib", f"{file}"]
        status = pytest.main([*own, "--benchmark-only", *map(str, options)])
        return status, len(ran)

    return run


def test_a_ratio_is_taken_within_a_round() -> None:
    # a machine that halves its speed from round to round: whatever is timed first in a round sees what the row sees
    speed, log = [1.0], []

    def timed(call):
        name, seconds = call()
        log.append(name)
        speed[0] *= 2 if name == "row" else 1
        return seconds * speed[0]

    rounds = Rounds(lambda: ("base", 0.3), lambda: ("row", 0.05), timed)
    for _ in range(4):
        rounds.before()
        rounds()
    assert log == ["base", "row"] * 4
    work = Work(lambda: None, amount=2.0, calls=2)
    case = Case(Group("sum", "plain", {"plain": None, "ours": None}, "images"), "ours")
    measured = session.Measured()
    measured.add(rounds.found, Work(lambda: None, amount=6.0, calls=6), work)
    found = measured.row(case)
    assert measured.ratios == pytest.approx(
        [0.3 / 6 / (0.1 / 2)] * 4
    )  # timed doubles the row's seconds before it gives them
    assert found["ratio"] == pytest.approx({"median": 1, "min": 1, "max": 1})
    assert found["milliseconds"] == pytest.approx({"median": 150, "min": 50, "max": 400})
    assert found["images_per_second"] == pytest.approx((10 + 5) / 2)


def test_small_calls_are_repeated_until_a_clock_sees_them() -> None:
    seconds = iter((5.0, 0.1, 0.003, 0.004))  # the first compiles, the second waits for another process
    assert repeats(lambda: None, lambda call: next(seconds), 0.02) == 7
    assert repeats(lambda: None, lambda call: 3.0, 0.02) == 1


def test_results_are_written_where_they_are_asked_for_alone(suite, tmp_path, capsys) -> None:
    assert suite("--quick")[0] == 0
    assert not list((tmp_path / "results").iterdir())
    assert "sort" in capsys.readouterr().out
    assert suite("--quick", "--json", tmp_path / "own.json")[0] == 0
    assert not list((tmp_path / "results").iterdir())
    assert suite("--quick", "--record")[0] == 0
    (recorded,) = (tmp_path / "results").iterdir()
    result = json.loads(recorded.read_text())
    assert result.keys() == json.loads((tmp_path / "own.json").read_text()).keys()
    assert result["suite"] == "quick" and result["rounds"] == session.TURNS * session.ROUNDS["quick"]
    rows = {(r["group"], r["name"]): r for r in result["rows"]}
    assert list(rows) == [("sum", "plain"), ("sum", "ours"), ("sum", "other"), ("sort", "alone"), ("sort", "grouped")]
    assert result["skipped"] == [{"group": "sum", "name": "gpu", "why": "no such device"}]
    assert rows["sum", "plain"]["baseline"] and rows["sum", "plain"]["ratio"] is None
    assert rows["sum", "ours"]["ratio"]["median"] == pytest.approx(4)
    assert rows["sum", "ours"]["images_per_second"] == pytest.approx(2)
    assert rows["sort", "grouped"]["ratio"]["max"] == pytest.approx(4)  # byte for byte
    assert rows["sort", "grouped"]["milliseconds"]["min"] == pytest.approx(16)
    assert rows["sort", "grouped"]["bytes_per_second"] == pytest.approx(2000)


def test_a_row_that_fails_costs_the_recording_and_no_other_row(suite, tmp_path, capsys) -> None:
    status, _ = suite("--quick", "--record", "--json", tmp_path / "own.json", ours="'no number'")
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "not recorded: a row failed" in capsys.readouterr().out
    assert not list((tmp_path / "results").iterdir())
    rows = [(r["group"], r["name"]) for r in json.loads((tmp_path / "own.json").read_text())["rows"]]
    assert rows == [("sum", "plain"), ("sum", "other"), ("sort", "alone"), ("sort", "grouped")]


def test_the_suite_is_gone_through_in_turns(suite, capsys) -> None:
    assert suite("--quick", "--collect-only", "-q")[0] == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "::" in line]
    assert [line.partition("turn ")[2] for line in lines] == ["1]"] * 6 + ["2]"] * 6


def test_a_part_of_the_suite_is_not_recorded(suite, capsys) -> None:
    status, calls = suite("--record", "-k", "sort")
    assert status == pytest.ExitCode.USAGE_ERROR and calls == 0
    assert "--record is of the whole suite" in capsys.readouterr().err


def test_a_slowed_part_is_the_row_that_is_named(suite, tmp_path, capsys) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    suite("--quick", "--json", before)
    capsys.readouterr()
    suite("--quick", "--json", after, "--against", before, ours=0.6)
    shown = capsys.readouterr().out
    assert "sum: ours is slower: ratio 4.00 (4.00 to 4.00) before, 3.33 (3.33 to 3.33) now" in shown
    assert "1 of 3 rows differ" in shown and shown.count(" is slower") == 1 and " is faster" not in shown
    command = [sys.executable, "-m", "benchmarks.suite.compare"]
    done = subprocess.run([*command, before, after], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.splitlines()[0].startswith("sum: ours is slower")
    same, differ = compare.report(*(json.loads(before.read_text()),) * 2)
    assert same == ["0 of 3 rows differ; baselines are compared with nothing"] and not differ


def test_the_slowest_change_comes_first_and_overlapping_spreads_are_no_change() -> None:
    def result(**ratios):
        rows = [
            {
                "group": "g",
                "name": name,
                "baseline": False,
                "ratio": dict(zip(("min", "median", "max"), r, strict=True)),
            }
            for name, r in ratios.items()
        ]
        return {"suite": "full", "machine": {"device": "a CPU"}, "rows": rows}

    before = result(a=(1, 1.1, 1.2), b=(2, 2, 2), c=(1, 1, 1), d=(1, 1, 1), e=(1, 1, 1))
    after = result(a=(0.9, 0.95, 1.0), b=(1, 1, 1), c=(1.5, 1.5, 1.5), d=(0.9, 0.9, 0.9), f=(1, 1, 1))
    lines, differ = compare.report(before, after)
    assert differ and [line[: line.index(": ratio")] for line in lines[:3]] == [
        "g: b is slower",
        "g: d is slower",
        "g: c is faster",
    ]
    assert lines[3:] == [
        "only before: g: e",
        "only now: g: f",
        "3 of 4 rows differ; baselines are compared with nothing",
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        ("[]", "is no result of the suite"),
        ('{"suite": "full", "rows": []}', "one is of the full suite, the other of the quick one"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_runs(suite, tmp_path, capsys, content, problem) -> None:
    if content is not None:
        (tmp_path / "other.json").write_text(content)
    status, calls = suite("--quick", "--against", tmp_path / "other.json")
    assert status == pytest.ExitCode.USAGE_ERROR and calls == 0
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("quick", [True, False])
def test_every_group_of_the_suite_has_one_baseline_and_a_name_of_its_own(quick) -> None:
    modules = [importlib.import_module(f"benchmarks.suite.{file.stem}") for file in FILES]
    found = cases(group for module in modules for group in module.groups(CPU, quick))
    names = {case.group.name for case in found}
    assert sorted(case.group.name for case in found if case.is_baseline) == sorted(names)
    assert all(sum(case.group.name == name for case in found) > 1 for name in names)
    assert len({str(case) for case in found}) == len(found)


def test_a_group_without_its_baseline_and_two_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="group sum has no row 'plain'"):
        Group("sum", "plain", {})
    group = Group("sum", "plain", {"plain": None})
    with pytest.raises(ValueError, match="two groups are called sum"):
        cases([group, copy.copy(group)])


def test_a_row_whose_baseline_is_not_here_has_its_reason(tmp_path) -> None:
    def absent(place):
        raise ImportError("No module named 'something'")

    made = session.Session(Place(CPU, True, tmp_path))
    group = Group("sum", "plain", {"plain": absent, "ours": lambda place: Work(lambda: None)})
    why = made.measure(Case(group, "ours"), pytest.fail)
    assert why == "ImportError: No module named 'something'"
    assert made.result()["skipped"] == [{"group": "sum", "name": "ours", "why": why}] and not made.measured


def test_the_table_has_every_row_and_every_reason(suite, tmp_path) -> None:
    suite("--quick", "--json", tmp_path / "own.json")
    text = markdown(json.loads((tmp_path / "own.json").read_text()))
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {6}
    assert "| sum | ours | 500 (500 to 500) | 4.00 (4.00 to 4.00) | 2.00 images |" in text
    assert "| sort | alone | 2.00 (2.00 to 2.00) | baseline | 500 B |" in text and "- sum: gpu: no such device" in text


def test_what_one_would_write_does_what_ours_does() -> None:
    found = []
    for step in (plain.guided_step, guided_step_ref):
        torch.manual_seed(0)
        found.append(bench_guided_step.calls_of({"": step}, "guided", 2, CPU, torch.float32)[""]())
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours)
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    torch.testing.assert_close(plain.soft_kl(student, teacher, 4.0), kl_at_temperature(student, teacher, 4.0))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_rows_of_the_quick_suite_can_be_made(file, tmp_path, monkeypatch) -> None:
    """The first two of each group, and none in Triton without a GPU."""
    monkeypatch.setattr(bench_loaders, "QUICK", {"32 png": (32, "png", 16)})
    monkeypatch.setattr(bench_loaders, "WORKERS", 0)
    place = Place(CPU, True, tmp_path)
    for group in importlib.import_module(f"benchmarks.suite.{file.stem}").groups(CPU, True):
        for make in list(group.rows.values())[:2]:
            work = make(place)
            work.call()
            assert work.amount > 1
        if "triton" in group.rows:
            with pytest.raises(Absent, match="no CUDA device"):
                group.rows["triton"](place)


def test_make_bench_is_the_suite_alone() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "ARGS"}
    listed = subprocess.run(["make", "-n", "bench", "ARGS=--quick"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert listed.stdout.splitlines()[-1].endswith("-m pytest benchmarks/suite --benchmark-only --quick")
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert own["testpaths"] == ["tests"]  # make test, which names no folder, collects none of the suite
