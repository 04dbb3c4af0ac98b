"""The hour on an H100: its caps, what is missing said first, a stage that fails, and all of it rehearsed on a CPU."""

import json
import sys
import tomllib

import pytest
import torch

from benchmarks import h100_cifar10 as hour
from benchmarks.h100_cifar10 import SETS, STAGES, Stage
from dfkd.errors import UsageError
from dfkd.run import read_job


def test_the_caps_make_an_hour_and_nothing_needs_what_comes_later():
    assert sum(stage.minutes for stage in STAGES.values()) == 60
    before = set()
    for name, stage in STAGES.items():
        assert before.issuperset(stage.needs), name
        before.add(name)
    assert STAGES["images"].minutes == STAGES["unguided"].minutes, "equal seconds"


def read(tmp_path, rehearse=False, data="parquet:cifar10", teacher=None):
    return hour.read_file(tmp_path, "stable-diffusion-v1-5/stable-diffusion-v1-5", data, teacher, rehearse)


@pytest.fixture
def cifar10(tmp_path):
    """A folder in the layout of torchvision's class folders, with CIFAR-10's classes and an image of each."""
    from PIL import Image

    names = tomllib.loads((hour.ROOT / "dfkd/presets/cifar10-fast.toml").read_text())["generate"]["classes"]
    for split in ("train", "test"):
        for number, name in enumerate(names):
            folder = tmp_path / "cifar10" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(folder / "0.png")
    (tmp_path / "cifar10" / "classes.json").write_text(json.dumps(names))
    return f"imagefolder:{tmp_path / 'cifar10'}"


def test_the_words_of_a_stage_are_those_of_the_runs_file(tmp_path, cifar10):
    """So that dfkd-run, which has the last stage, finds all others done."""
    file, counts = read(tmp_path, data=cifar10), {"images": 400, "unguided": 1400}
    job = read_job(tomllib.loads(hour.toml(file, counts)), tmp_path)
    guided, unguided = job.variants
    assert (guided.generate.count, unguided.generate.count) == (400, 1400)
    assert unguided.generate.generate.guidance.step == 0 and guided.generate.generate.guidance.step > 0
    assert guided.distill.distill.student == "wrn16_2" and job.teacher.architecture == "wrn40_2"
    found = hour.commands(file, tmp_path, "wrn40_2", counts, rehearse=False)
    for name, variant in zip(SETS, job.variants, strict=True):
        asked = parsed(found[name])
        assert asked.generate == variant.generate.generate and asked.prior == variant.generate.prior
        assert (asked.out, asked.count, asked.seed) == (
            variant.generate.out, variant.generate.count, variant.generate.seed
        )  # fmt: skip
        learned = parsed(found[SETS[name][1]])
        assert (learned.distill, learned.out, learned.data) == (
            variant.distill.distill, variant.distill.out, variant.distill.data
        )  # fmt: skip
        assert parsed(found[SETS[name][0]]).plan_only
    assert parsed(found["teacher"]) == job.teacher


def parsed(words):
    """The settings of a command's words."""
    from dfkd.cli.parse import parse
    from dfkd.config import DistillCommand, GenerateCommand, TrainTeacherCommand

    assert words[1:3] == ["-m", "dfkd"]
    classes = {"generate": GenerateCommand, "distill": DistillCommand, "train-teacher": TrainTeacherCommand}
    return parse(classes[words[3]], words[4:], "dfkd-it")


def test_words_of_the_other_stages_are_options(tmp_path, monkeypatch, capsys):
    """Another wrong one would be found out in the hour."""
    from benchmarks import bench_sampling, driver
    from dfkd.cli import engines

    monkeypatch.setattr(driver, "resolve_device", torch.device)  # here it need not be there
    for words in (hour.SPEED, hour.SPEED_REHEARSED):
        monkeypatch.setattr("sys.argv", ["bench_sampling", *words.split(), "--no-such-option"])
        with pytest.raises(SystemExit):
            bench_sampling.main()
        assert capsys.readouterr().err.strip().endswith("error: unrecognized arguments: --no-such-option")
    words = hour.commands(read(tmp_path), tmp_path, "wrn40_2", {}, rehearse=False)["engines"]
    assert words[1:5] == ["-m", "dfkd", "engines", "build"]
    cut = words.index("--")
    options = engines.parse(engines.Build, words[5:cut], "dfkd-engines")
    chosen = engines.read_set(options, words[cut + 1 :])
    assert chosen.backends == ("inductor",)
    assert options.engines == chosen.run.generate.compute.engines == tmp_path / "engines"


@pytest.mark.parametrize("local", [True, False])
def test_a_prior_of_the_hub_is_fetched_before_the_hour_and_not_asked_for_again(tmp_path, cifar10, monkeypatch, local):
    prior, checked, given = str(tmp_path) if local else "owner/name", [], []
    monkeypatch.setattr(hour, "check", lambda file, *_: checked.append("offline" in file["generate"]) or "wrn40_2")
    monkeypatch.setattr(hour, "stages", lambda file, *_: given.append(file) or {})
    monkeypatch.setattr(hour, "summary", lambda found: {})
    monkeypatch.setattr("sys.argv", ["h100_cifar10", "--prior", prior, "--data", cifar10, "--out", str(tmp_path)])
    hour.main()
    assert checked == [False] and given[0]["generate"].get("offline", False) is not local


def test_as_many_images_are_planned_as_fit_the_seconds():
    planned = {"plan": {"images": 2000, "predicted_seconds": 800.0}}  # 2.5 a second, of 80 % of the time
    assert hour.counted(planned, 780, 200) == 1400
    assert hour.counted(planned, 1, 200) == 200


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"data": "parquet:/nowhere"}, "/nowhere"), ({"prior": "/no/prior"}, "/no/prior"),
     ({"data": "digits-on-photos"}, "is not CIFAR-10"), ({"teacher": "/no/teacher"}, "/no/teacher"), ({}, "CUDA")],
)  # fmt: skip
def test_what_is_missing_is_said_before_the_first_minute(tmp_path, cifar10, monkeypatch, capsys, changes, named):
    if named != "CUDA":  # of which this machine may have none
        monkeypatch.setattr(hour, "require_gpu", lambda: None)
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hour, "describe", lambda device: pytest.fail("the hour has begun"))
    given = {"prior": "stable-diffusion-v1-5/stable-diffusion-v1-5", "data": cifar10, **changes}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", ["h100_cifar10", *words, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as done:
        hour.main()
    said = capsys.readouterr().err.strip().splitlines()
    assert done.value.code == 2 and named in said[-1] and said[-1].startswith("error: ")
    assert not (tmp_path / "out" / hour.RESULTS).exists()


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """Stages of three programs, by name -> their text; returns a function that runs them all."""

    def scripted(**programs):
        chain = {name: Stage(1, before) for name, before in
                 (("speed", ()), ("teacher", ("speed",)), ("images", ("teacher",)))}  # fmt: skip
        monkeypatch.setattr(hour, "STAGES", {**chain, "teacher": Stage(0.05, ("speed",))})
        monkeypatch.setattr(hour, "SETS", {})
        monkeypatch.setattr(hour, "commands", lambda *_: {n: [sys.executable, "-c", t] for n, t in programs.items()})
        return hour.stages(read(tmp_path, rehearse=True), tmp_path, "resnet8_half", True, {"commit": "a"})

    return scripted


SAYS = "print('words'); print('{\"a\": 1}', flush=True)"


def test_a_stage_that_is_stopped_costs_what_needs_it_and_goes_on_when_started_again(scripted, tmp_path):
    hangs = f"{SAYS}; import time; time.sleep(60)"
    found = scripted(speed=SAYS, teacher=hangs, images=SAYS)
    assert found["speed"]["result"] == {"a": 1} and "why" not in found["speed"]
    assert found["teacher"]["why"].startswith("it was stopped after 0.05 minutes")
    assert found["teacher"]["result"] == {"a": 1}, "what it told until then"
    assert found["images"]["why"] == "teacher is not done" and found["images"]["seconds"] == 0
    again = scripted(speed=SAYS, teacher=SAYS, images="raise ValueError('out of luck')")
    assert again["speed"] == found["speed"], "what is done is not done twice"
    assert "why" not in again["teacher"] and again["images"]["why"] == "ValueError: out of luck"
    assert json.loads((tmp_path / hour.RESULTS).read_text())["stages"] == again


def test_a_record_of_something_else_is_refused(tmp_path):
    (tmp_path / hour.RESULTS).write_text("[]")
    with pytest.raises(UsageError, match="move it away"):
        hour.stages(read(tmp_path, rehearse=True), tmp_path, "resnet8_half", True, {})


@pytest.mark.slow
def test_the_hour_is_rehearsed_and_a_second_start_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(hour.ROOT)
    minutes = {name: Stage(10, stage.needs) for name, stage in STAGES.items()}  # others may run beside it
    monkeypatch.setattr(hour, "STAGES", minutes)

    def start():
        monkeypatch.setattr("sys.argv", ["h100_cifar10", "--rehearse", "--out", str(tmp_path)])
        hour.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    found = start()
    assert list(found["stages"]) == list(STAGES) and not any("why" in own for own in found["stages"].values())
    assert all(0 <= value <= 1 for value in found["accuracy"].values())
    assert all(count > 0 and count % 10 == 0 for count in found["images"].values())
    report = found["stages"]["report"]["result"]
    assert report["accuracy"] == found["accuracy"]["student"] and (tmp_path / "report" / "report.html").exists()
    assert report["baselines"] == {"unguided": found["accuracy"]["unguided-student"]}
    weights = [path for path in tmp_path.rglob("*.safetensors") if path.parent.name == "last"]
    assert len(weights) == 2, "dfkd-run found both students done"
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert start() == found
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
