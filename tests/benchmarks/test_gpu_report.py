"""The report of a GPU: a section that fails costs its own rows alone, and nothing on record gives way to less."""

import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import driver, gpu_report
from benchmarks.gpu_report import REHEARSAL, SECTIONS, RecordError, Section, environment, markdown, merged, read, report

ROOT = Path(__file__).parents[2]
BARE = str(Path(__file__).parent / "bare_machine")  # a PYTHONPATH without diffusers, DALI, scikit-learn and others


@pytest.mark.slow
def test_a_section_is_rehearsed_on_a_bare_machine(monkeypatch):
    """The same code as on a GPU, with no row left out; the other sections' benchmarks have rehearsals of their own."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    monkeypatch.setenv("PYTHONPATH", BARE)
    monkeypatch.setitem(SECTIONS, "bn_moments", replace(SECTIONS["bn_moments"], seconds=600))  # others run beside it
    (found,) = report(["bn_moments"], rehearse=True, minutes=10).values()
    assert "why" not in found, found["why"]
    machine = found["result"]["machine"]
    text = markdown({"machine": machine, "sections": {"bn_moments": {"machine": machine, **found}}})
    assert "moments\n\n| " in text and "Not measured" not in text


def test_a_bare_machine_names_what_the_networks_of_diffusion_lack(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", BARE)
    monkeypatch.setitem(SECTIONS, "sampling", replace(SECTIONS["sampling"], seconds=600))
    assert report(["sampling"], rehearse=True, minutes=10)["sampling"]["why"] == "diffusers is not installed"


@pytest.mark.slow
def test_a_bare_machine_measures_loaders_and_names_those_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", BARE)
    program = (
        "import json, pathlib, sys, torch; from benchmarks import bench_loader as bench, driver; bench.BATCH = 8; "
        "sets, folder, cpu = {'32 png': (32, 'png', 16)}, pathlib.Path(sys.argv[1]), torch.device('cpu'); "
        "*_, found = driver.measure(bench.groups(cpu, folder, 0, sets), cpu, 1); print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    lacking = {row["name"] for row in result["failures"]}
    assert lacking == {"dali", "webdataset", "datasets", "dali, decoding", "dali, decoded once"}
    assert {"DataLoader + PIL", "resident", "torch"} < {row["name"] for row in result["rows"]}


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("which", ["given", "rehearsed"])
def test_a_sections_words_are_options_of_its_benchmark(name, which, monkeypatch, capsys):
    """Another wrong one would be found out on a GPU alone."""
    section = SECTIONS[name]
    module = importlib.import_module(f"benchmarks.{section.module}")
    monkeypatch.setattr(driver, "resolve_device", torch.device)  # here it need not be there
    monkeypatch.setattr("sys.argv", [section.module, *getattr(section, which).split(), "--no-such-option"])
    with pytest.raises(SystemExit):
        module.main()
    assert capsys.readouterr().err.strip().endswith("error: unrecognized arguments: --no-such-option")
    assert callable(importlib.import_module(f"benchmarks.{section.tables}").markdown)


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Sections of scripts: text of a module -> a Section that runs it as benchmarks.NAME."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(gpu_report, "RESULTS", package / "results")

    def make(name, text, seconds=60):
        (package / f"{name}.py").write_text(text)
        return Section(name.title(), name, name, "", "--rehearse", seconds)

    return make


def test_a_section_that_fails_costs_no_other(scripts, monkeypatch):
    sections = {
        "absent": scripts("absent", "import no_such_package"),
        "fails": scripts("fails", "raise ValueError('out of luck')"),
        "exits": scripts("exits", "import sys; sys.exit(3)"),
        "babbles": scripts("babbles", "print('no JSON')"),
        "hangs": scripts("hangs", "import time; time.sleep(60)", seconds=1),
        "works": scripts("works", "print('a line'); print('{\"rows\": [1]}')"),
    }
    monkeypatch.setattr(gpu_report, "SECTIONS", sections)
    found = report(list(sections), rehearse=True, minutes=1)
    assert found["absent"]["why"] == "no_such_package is not installed"
    assert found["fails"]["why"] == "ValueError: out of luck"
    assert found["exits"]["why"] == "it ended with exit status 3"
    assert found["babbles"]["why"] == "its output has no line of JSON"
    assert found["hangs"]["why"] == "it was stopped after 1 s"
    assert found["works"]["result"] == {"rows": [1]}


TELLS = """
import json, sys, time
for rows in ([1], [1, 2]):
    print(json.dumps({"rows": rows}), flush=True)
print('{"rows": [1, 2, 3', end="", flush=True)
"""


def test_rows_of_a_section_that_does_not_end_are_kept(scripts, monkeypatch):
    """The last whole line of JSON; a line that was cut is none."""
    sections = {
        "stopped": scripts("stopped", TELLS + "time.sleep(60)", seconds=2),
        "breaks": scripts("breaks", TELLS + "raise MemoryError('no more')"),
        "says": scripts("says", "print(3, flush=True); raise MemoryError('no more')"),
    }
    monkeypatch.setattr(gpu_report, "SECTIONS", sections)
    found = report(list(sections), rehearse=True, minutes=1)
    assert found["stopped"].items() >= {"why": "it was stopped after 2 s", "result": {"rows": [1, 2]}}.items()
    assert found["breaks"].items() >= {"why": "MemoryError: no more", "result": {"rows": [1, 2]}}.items()
    assert "result" not in found["says"]


def test_the_report_says_what_each_section_was_measured_with(monkeypatch):
    sections = {name: Section(name.title(), name, "bench_fake", "", "", 1) for name in ("old", "new", "cut", "none")}
    monkeypatch.setattr(gpu_report, "SECTIONS", sections)
    fake = ModuleType("benchmarks.bench_fake")
    fake.markdown = lambda result: f"table of {result}"
    monkeypatch.setitem(sys.modules, "benchmarks.bench_fake", fake)
    now = {"device": "H", "versions": {"torch": "2.11"}, "python": "3.12", "commit": "b", "date": "2026-02-02"}
    then = {**now, "versions": {"torch": "2.10"}, "commit": "a", "date": "2026-01-01"}
    found = {
        "old": {"machine": then, "result": 1, "again": {"machine": now, "why": "it broke"}},
        "new": {"machine": now, "result": 2},
        "cut": {"machine": now, "result": 3, "why": "it was stopped after 9 s"},
        "none": {"machine": now, "why": "diffusers is not installed"},
    }
    assert markdown({"machine": now, "sections": found}).split("\n\n") == [
        "# H",
        "torch 2.11; Python 3.12, commit b, 2026-02-02: `make gpu-report`.",
        *("## Old", "table of 1", "With torch 2.10; Python 3.12, commit a, 2026-01-01."),
        "Tried again with torch 2.11; Python 3.12, commit b, 2026-02-02: it broke.",
        *("## New", "table of 2"),
        *("## Cut", "table of 3", "Rows until then: it was stopped after 9 s."),
        *("## None", "Not measured: diffusers is not installed.\n"),
    ]


def test_what_the_time_does_not_reach_is_named(scripts, monkeypatch):
    sections = {name: scripts(name, "print('{}')") for name in ("first", "second")}
    monkeypatch.setattr(gpu_report, "SECTIONS", sections)
    clock = iter([0.0, 1.0, 61.0, 62.0])
    monkeypatch.setattr(gpu_report.time, "perf_counter", lambda: next(clock, 100.0))
    monkeypatch.setattr(gpu_report, "run", lambda *_: {"seconds": 60.0, "result": {}})
    assert report(list(sections), True, 1.0)["second"] == {"seconds": 0.0, "why": "1 minutes were over"}


def test_a_section_gets_what_is_left_of_the_time(scripts, monkeypatch):
    monkeypatch.setattr(gpu_report, "SECTIONS", {"hangs": scripts("hangs", "import time; time.sleep(60)")})
    started = time.perf_counter()
    found = report(["hangs"], True, 1 / 60)
    assert "stopped" in found["hangs"]["why"] and time.perf_counter() - started < 30


def test_a_gpu_never_gets_interpreted_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not environment(rehearse=False).keys() & REHEARSAL.keys()
    assert environment(rehearse=True).items() >= REHEARSAL.items()


THEN, NOW = {"commit": "a"}, {"commit": "b"}
WHOLE, CUT, FAILED = {"result": {"rows": [1, 2]}}, {"result": {"rows": [1]}, "why": "stopped"}, {"why": "broken"}


def of(machine, found):
    return {"machine": machine, "seconds": 1.0, **found}


@pytest.mark.parametrize(
    "before, now, stays",
    [(WHOLE, WHOLE, False), (WHOLE, CUT, True), (WHOLE, FAILED, True), (CUT, WHOLE, False), (CUT, CUT, False),
     (CUT, FAILED, True), (FAILED, WHOLE, False), (FAILED, CUT, False), (FAILED, FAILED, False)],
)  # fmt: skip
def test_nothing_gives_way_to_less(before, now, stays):
    record, later = {"loader": of(THEN, before)}, {"loader": of(NOW, now)}
    found = merged(record, later)["loader"]
    if stays:
        assert found == {**record["loader"], "again": {"machine": NOW, "seconds": 1.0, "why": now["why"]}}
    else:
        assert found == later["loader"]
    assert "again" not in merged({"loader": found}, {"loader": of(NOW, WHOLE)})["loader"]


def test_other_sections_stay_in_the_order_of_the_report():
    record = {"loader": of(THEN, FAILED), "sampling": of(THEN, WHOLE)}
    found = merged(record, {"soft_kl": of(NOW, WHOLE)})
    assert list(found) == ["sampling", "soft_kl", "loader"] and found.items() >= record.items()


def test_reading(tmp_path):
    path = tmp_path / "record.json"
    assert read(path) == {}
    for name in ("loader", "paths"):
        path.write_text(json.dumps({"machine": NOW, "sections": {name: of(THEN, WHOLE)}}))
        if name in SECTIONS:
            assert read(path) == {name: of(THEN, WHOLE)}
    with pytest.raises(RecordError, match="a section 'paths' of another version"):
        read(path)
    for text in ("", "[]", "{}", '{"sections": []}', '{"sections": {"loader": 3}}'):
        path.write_text(text)
        with pytest.raises(RecordError, match="is no record"):
            read(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it measures")
def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_report"])
    with pytest.raises(SystemExit, match="finds no CUDA device"):
        gpu_report.main()


def test_files_are_written_on_a_gpu_alone(scripts, monkeypatch, capsys):
    texts = {"works": "print('{\"rows\": []}')", "fails": "raise ValueError('no')"}
    sections = {name: scripts(name, text) for name, text in texts.items()}
    monkeypatch.setattr(gpu_report, "SECTIONS", sections)
    machine = {"device": "NVIDIA H100 80GB HBM3", "versions": {}, "python": "3", "commit": None, "date": "2026-01-01"}
    monkeypatch.setattr(gpu_report, "describe", lambda device: machine)
    monkeypatch.setattr(gpu_report, "markdown", lambda result: "# tables\n")
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--only", "works", "--rehearse"])
    gpu_report.main()
    assert not gpu_report.RESULTS.exists()
    gpu_report.RESULTS.mkdir()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--only", "works"])
    gpu_report.main()
    stem = gpu_report.RESULTS / "gpu-report-nvidia-h100-80gb-hbm3"
    assert json.loads(stem.with_suffix(".json").read_text()) == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert stem.with_suffix(".md").read_text() == "# tables\n"
    first = json.loads(stem.with_suffix(".json").read_text())["sections"]["works"]
    monkeypatch.setattr(gpu_report, "describe", lambda device: {**machine, "commit": "later"})
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--only", "fails"])
    with pytest.raises(SystemExit, match="1"):  # nothing was measured this time
        gpu_report.main()
    kept = json.loads(stem.with_suffix(".json").read_text())
    assert kept["machine"]["commit"] == kept["sections"]["fails"]["machine"]["commit"] == "later"
    assert kept["sections"]["works"] == first and first["machine"] == machine
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])["sections"]) == ["fails"]
    stem.with_suffix(".json").write_text("{")
    monkeypatch.setattr(gpu_report, "report", None)  # it would measure first
    with pytest.raises(SystemExit, match="is no record of a gpu-report: move it away"):
        gpu_report.main()


def test_an_unknown_section_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--only", "kernels"])
    with pytest.raises(SystemExit):
        gpu_report.main()
    assert "unknown 'kernels'; known are sampling, distill" in capsys.readouterr().err
