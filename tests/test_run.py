"""dfkd-run: one file, one folder; every section checked before work; started again, nothing is done twice."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd import run
from dfkd.cli import run as cli
from dfkd.config import DistillConfig, GenerateConfig, presets, read_preset, section
from dfkd.errors import UsageError
from dfkd.evaluation import students
from dfkd.evaluation.run_folder import Baseline
from dfkd.evaluation.tested import strong_kind
from dfkd.run import read_job
from dfkd.synthesis.controls import CONTROLS
from dfkd.teachers import Classifier
from dfkd_engine.errors import EngineError
from tests.cli.small_generate import CLASS_NAMES, last_line, save_classifier, status_of
from tests.shard_folders import class_folders
from tests.synthesis.small_sd import make_small_sd

FILE = """
controls = ["deepinversion"]

[teacher]
data = "imagefolder:{images}"
architecture = "resnet8"
input-size = 16
epochs = "none"
steps = 2
batch-size = 6
device = "cpu"

[generate]
prior = "{prior}"
count = 6
group = 3
steps = 1
device = "cpu"

[distill]
student = "resnet8"
steps = 2
batch-size = 4
augment = "none"
device = "cpu"

[evaluate]
data = "imagefolder:{images}"
device = "cpu"

[baselines.noise]
method = "noise"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's file, its images and a small prior; the run is made once."""
    root = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    for name in CLASS_NAMES:
        (root / "images" / name).mkdir(parents=True)
        for index in range(10):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{index}.png")
    prior = make_small_sd(root / "prior")
    (root / "job.toml").write_text(FILE.format(images=root / "images", prior=prior))
    return root


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    assert status_of(cli.main, place / "job.toml", "--out", place / "out", "--seed", 3) == 0
    return place / "out"


def test_everything_lies_in_one_folder(done: Path) -> None:
    controls = {"noise", "deepinversion"}
    for part in ("teacher", "student", "baselines/noise/student"):
        assert (done / part / "result.json").exists() and (done / part / "settings.json").exists()
    for part in ("synthetic", "baselines/noise/synthetic"):
        assert (done / part / "manifest.json").exists()
        assert json.loads((done / part / "settings.json").read_text())["options"]["seed"] == 3
    tests = json.loads((done / "evaluation.json").read_text())
    assert tests["images"] == 6 and tests["baselines"].keys() == controls
    report = json.loads((done / "report" / "report.json").read_text())
    assert report["accuracy"]["student"] == tests["student"]["accuracy"]
    assert report["accuracy"]["baselines"] == {name: tests["baselines"][name]["accuracy"] for name in controls}
    assert report["missing"] == {} and set(report["teacher_views"]) == {"guided images", *controls}
    assert set(report["costs"]) == {"teacher", "student"} and len(report["answers"]) == 4
    assert Classifier.from_pretrained(done / "student" / "last").class_names == tuple(sorted(CLASS_NAMES))


def test_started_again_it_does_nothing_twice(
    place: Path, done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> dict[str, int]:
        kept = (path for path in done.rglob("*") if path.is_file() and path.parent.name != "synthetic")
        return {str(path): path.stat().st_mtime_ns for path in kept}

    def again(*given: object, **more: object) -> None:
        raise AssertionError("tested again")

    before = state()
    monkeypatch.setattr(students, "ask", again)
    assert status_of(cli.main, "--config", place / "job.toml", "--out", done, "--seed", 3) == 0
    printed = capsys.readouterr()
    result = last_line(printed.out)
    assert state() == before
    assert list(result)[-1] == "accuracy" and result["baselines"].keys() == {"noise", "deepinversion"}
    assert sum(result["outcomes"][who] for who in ("both_right", "student_only", "teacher_only", "both_wrong")) == 6
    assert "Can the student replace the teacher?" in printed.err


def test_a_control_keeps_the_steps_of_equal_seconds(done: Path) -> None:
    steps = json.loads((done / "baselines/deepinversion/equal-seconds.json").read_text())["steps"]
    settings = json.loads((done / "baselines/deepinversion/synthetic/settings.json").read_text())
    assert settings["options"]["method"] == f"deepinversion(steps={steps})"


@pytest.mark.parametrize("preset", ["demo", "cifar10", "domainnet-sketch"])
def test_controls_are_what_the_report_takes_for_strong(preset: str, tmp_path: Path) -> None:
    file = {"preset": preset, "teacher": {"data": "digits-on-photos"}}
    job = read_job({**file, "controls": ["noise"]}, tmp_path / "out", controls=list(CONTROLS))
    made = {one.name: Baseline(None, None, 0.0, {"options": one.generate.flat()}) for one in job.variants[1:]}
    assert {name: strong_kind(one) for name, one in made.items()} == {
        "unguided": None,
        "unguided-pixels": "unguided-pixels",
        "deepinversion": "deepinversion",
        "noise": None,
    }


def test_controls_of_a_file_replace_those_of_its_preset(tmp_path: Path) -> None:
    file = {"preset": "demo", "controls": list[str]()}
    assert [one.name for one in read_job(file, tmp_path).variants] == ["", "unguided"]
    more = read_job({**file, "controls": ["noise"]}, tmp_path, controls=["deepinversion"]).variants
    assert [one.name for one in more if one.control] == ["noise", "deepinversion"]


def test_a_section_comes_before_a_control_of_its_name(tmp_path: Path) -> None:
    sections = {"deepinversion": {"method": "deepinversion(steps=3)"}}
    _, own = parsed(tmp_path, controls=["deepinversion"], baselines=sections).variants
    assert own.generate.generate.method == "deepinversion(steps=3)" and not own.control


@pytest.mark.parametrize("choice", [{}, {"candidates": 2, "keep": "learnable"}])
def test_controls_without_an_adversarial_loss_have_no_student_but_to_choose_by(
    choice: dict[str, Any], tmp_path: Path
) -> None:
    student = save_classifier(tmp_path / "student")
    adversary = {"adv-weight": 1.0, "adv-clamp": 2.0, "student-checkpoint": str(student)}
    controls = ["deepinversion", "noise", "unguided-pixels"]
    ours, *baselines = parsed(tmp_path, controls=controls, baselines={}, generate={**adversary, **choice}).variants
    found = {one.name: one.generate.student_checkpoint for one in baselines}
    assert ours.generate.student_checkpoint == found["unguided-pixels"] == student
    assert (found["deepinversion"], found["noise"]) == (student if choice else None, None)


def test_other_settings_are_refused_by_the_stage(
    place: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.toml").write_text((place / "job.toml").read_text().replace("count = 6\n", "count = 6\ncfg = 9\n"))
    assert status_of(cli.main, tmp_path / "job.toml", "--out", done, "--seed", 3) == 2
    assert "cfg" in capsys.readouterr().err


def test_a_test_of_other_classes_is_refused_before_the_images(tmp_path: Path) -> None:
    file = {"preset": "demo", "teacher": {"checkpoint": str(save_classifier(tmp_path / "teacher"))}}
    file["evaluate"] = {"data": f"imagefolder:{tmp_path}/{{split}}"}
    for name in ("one", "seven"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "test" / name / "0.png")
    with pytest.raises(UsageError, match="classes seven"):
        run.run_job(read_job(file, tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def parsed(out: Path, **sections: Any) -> Any:
    file = {"generate": {}, "distill": {"student": "resnet8"}, "teacher": {"data": "digits-on-photos"}} | sections
    file["teacher"] = {"architecture": "resnet8"} | file["teacher"]
    return read_job(file, out)


def test_a_test_of_other_classes_is_refused_before_a_teacher_is_trained(tmp_path: Path) -> None:
    data = {"data": str(class_folders(tmp_path / "images", ("one", "two")))}
    test = {"data": str(class_folders(tmp_path / "real", ("one", "seven")))}
    with pytest.raises(UsageError, match="classes seven: the classifier knows one, two"):
        parsed(tmp_path / "out", teacher=data, evaluate=test)


def test_a_student_that_cannot_be_trained_is_refused_before_a_teacher_is(tmp_path: Path) -> None:
    text = "from torch import nn\n\ndef build(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(3, 2))\n"
    (tmp_path / "net.py").write_text(text)
    data = class_folders(tmp_path / "images", ("zero", "one"))
    file = {
        "teacher": {"data": f"imagefolder:{data}", "architecture": "resnet8"},
        "distill": {"student": f"file:{tmp_path}/net.py:build", "batch-size": 4},
    }
    with pytest.raises(UsageError, match="given 4 images of 32 x 32"):
        read_job(file, tmp_path / "out")


def test_a_teacher_that_exists(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "teacher")
    job = parsed(tmp_path / "out", teacher={"checkpoint": str(folder)})
    assert job.teacher is None and job.classifier.checkpoint == folder
    torch.save(Classifier.from_pretrained(folder).state_dict(), tmp_path / "t.pth")
    described = {"checkpoint": str(tmp_path / "t.pth"), "normalisation": "cifar10", "input-size": 16}
    job = parsed(tmp_path / "out", teacher=described, generate={"classes": list(CLASS_NAMES)})
    wanted = (tmp_path / "t.pth", "resnet8", "cifar10", 16, CLASS_NAMES)
    for config in (job.classifier, job.variants[0].generate.teacher, job.variants[0].distill.teacher):
        assert wanted == (config.checkpoint, config.teacher, config.normalisation, config.input_size, config.classes)
    job = parsed(tmp_path / "out", teacher={"architecture": "transformers:owner/name"})
    assert (job.teacher, job.classifier.teacher) == (None, "transformers:owner/name")


def test_a_preset_may_be_the_start(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "teacher")
    file = {"preset": "demo", "teacher": {"checkpoint": str(folder)}, "distill": {"epochs": 3}}
    job = read_job(file, tmp_path / "out", seed=5)
    ours, unguided, pixels = job.variants
    assert (job.teacher, job.classifier.checkpoint, job.classifier.teacher) == (None, folder, None)
    assert ours.generate.generate == GenerateConfig.preset("demo")
    assert unguided.generate.generate == GenerateConfig.preset("demo", guidance_step=0)
    assert ours.distill.distill == DistillConfig.preset("demo", epochs=3, seed=5)
    assert (unguided.name, unguided.generate.out) == ("unguided", tmp_path / "out/baselines/unguided/synthetic")
    assert ours.generate.seed == 5 and job.evaluate is not None
    assert pixels.name == "unguided-pixels" and pixels.control


@pytest.mark.parametrize(
    "name", [name for name in presets() if section(read_preset(name), "distill")]
)  # others: teachers
def test_every_preset_is_a_run_once_it_has_data(name: str, tmp_path: Path) -> None:
    job = read_job({"preset": name, "teacher": {"data": "digits-on-photos"}}, tmp_path)
    assert job.teacher is not None and job.variants[0].generate.teacher.checkpoint == tmp_path / "teacher"


def test_the_published_rounds(tmp_path: Path) -> None:
    rounds = read_job({"preset": "domainnet-sketch", "teacher": {"data": "digits-on-photos"}}, tmp_path).rounds
    assert rounds is not None and (rounds.phases, rounds.ids(2000)[2]) == (20, range(200, 300))
    assert [rounds.against(phase) for phase in range(4)] == [False, False, True, True]
    train = rounds.refresh.distill.train
    assert (train.epochs, train.optimiser.lr, train.optimiser.weight_decay) == (30, 0.1, 5e-4)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"generat": {}}, r"unknown section \[generat\].*did you mean generate"),
        ({"generate": {"stepz": 3}}, r"\[generate\] stepz: unknown option: did you mean steps"),
        ({"generate": {"steps": 0}}, r"\[generate\] steps is 0: it must be at least 1"),
        ({"generate": {"out": "x"}}, r"\[generate\] out: the run sets it"),
        ({"generate": {"teacher": "resnet20"}}, r"\[generate\] teacher is resnet20: \[teacher\] says resnet8"),
        (
            {"teacher": {"data": "digits-on-photos", "resize": "published"}, "generate": {"resize": "antialias"}},
            r"\[generate\] resize is antialias: \[teacher\] says published",
        ),
        ({"generate": {"method": "magic"}}, r"magic"),
        ({"generate": {"sampler": "absent.py:Mine"}}, r"no file absent.py"),
        ({"generate": {"prompt": "a {digit}"}}, r"prompt 'a \{digit\}' cannot be filled in"),
        ({"generate": {"prior": "./absent"}}, r"prior ./absent: no such folder"),
        ({"generate": {"loss": ["absent.py:Entropy"]}}, r"no file absent.py"),
        ({"generate": {"student-checkpoint": "absent", "adv-weight": 1}}, r"--student-checkpoint absent: there is no"),
        ({"generate": {"only": ["ten"]}}, r"unknown class 'ten'"),
        ({"baselines": {"b": {"only": ["eleven"]}}}, r"unknown class 'eleven'"),
        ({"distill": {"student": "resnet8", "loss": ["absent.py:Hint"]}}, r"no file absent.py"),
        ({"distill": {"student": "resnet8", "amp": "fp16", "device": "cpu"}}, r"--amp fp16 on a CPU"),
        ({"distill": {"student": "file:absent.py:net"}}, r"no file absent.py"),
        ({"teacher": {"data": "digits-on-photos", "amp": "fp16", "device": "cpu"}}, r"--amp fp16 on a CPU"),
        ({"evaluate": {"data": "digits-on-photos", "split": "all"}}, r"has no split 'all'"),
        ({"baselines": {"b": {"guidance-stepp": 1}}}, r"\[baselines.b\] guidance-stepp.*did you mean guidance-step"),
        ({"distill": {}}, r"\[distill\] student is missing"),
        ({"distill": {"student": "resnet9"}}, r"unknown architecture 'resnet9'"),
        ({"evaluate": {"data": "imagefolder:absent"}}, r"\[evaluate\] data imagefolder:absent: there is no absent"),
        ({"teacher": {"data": "mnist"}}, r"\[teacher\] data mnist: there is no such data"),
        ({"teacher": {}}, r"\[teacher\] says neither how it is trained nor where it is"),
        ({"teacher": {"checkpoint": "absent.pth"}}, r"\[teacher\] checkpoint absent.pth: there is no such file"),
        ({"teacher": {"checkpoint": ".", "lr": 0.1}}, r"\[teacher\] lr: known of a teacher that exists"),
        ({"preset": "dmo"}, r"no preset 'dmo'"),
        ({"generate": 3}, r"generate is 3: it is a section"),
        ({"baselines": {"../x": {}}}, r"\[baselines\] ../x: a baseline is a section"),
        ({"controls": ["unguidd"]}, r"controls: there is no 'unguidd': there are unguided, unguided-pixels"),
        ({"controls": "noise"}, r"controls is 'noise': it is a list"),
        ({"controls": [3]}, r"controls: there is no 3"),
        ({"baselines": {"noise": 3}}, r"\[baselines\] noise: a baseline is a section"),
    ],
)
def test_every_section_is_checked_before_work(sections: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises((UsageError, EngineError)) as caught:
        parsed(tmp_path / "out", **sections)
    assert re.search(words, str(caught.value)), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_absent_library_is_told_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    for sections in ({"distill": {"student": "timm:resnet50"}}, {"teacher": {"architecture": "timm:resnet50"}}):
        with pytest.raises(UsageError, match="'timm:' needs timm: it is not installed"):
            parsed(tmp_path, **sections)


def test_the_command_asks_for_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.toml").write_text("[generate\n")
    cases = [
        ((), "give FILE.toml, or --preset demo"),
        (("x.toml", "--preset", "demo"), "give FILE.toml"),
        (("absent.toml",), "cannot read absent.toml"),
        ((tmp_path / "bad.toml",), "is not TOML"),
        (("--preset", "dmo"), "no preset 'dmo'"),
    ]
    for argv, words in cases:
        assert status_of(cli.main, *argv) == 2
        assert words in capsys.readouterr().err


def test_the_command_names_the_real_images(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--data stands for the file's [evaluate] data, whose other options stay; a preset without a test gets one."""
    jobs: list[run.Job] = []
    monkeypatch.setattr(run, "run_job", lambda job, *_: jobs.append(job) or {"accuracy": None, "report": "", "out": ""})
    other = f"imagefolder:{place / 'images'}"
    assert status_of(cli.main, place / "job.toml", "--out", tmp_path / "a", "--data", other + "?classes=one,two") == 0
    assert jobs[-1].evaluate is not None and jobs[-1].evaluate.data == other + "?classes=one,two"
    assert jobs[-1].evaluate.device == "cpu"
    assert status_of(cli.main, "--preset", "cifar10-mini", "--out", tmp_path / "b") == 0
    assert jobs[-1].evaluate is None
    assert status_of(cli.main, "--preset", "cifar10-mini", "--out", tmp_path / "c", "--data", other) == 0
    assert jobs[-1].evaluate.data == other
    assert status_of(cli.main, "--preset", "cifar10-mini", "--out", tmp_path / "d", "--data", "cifar:nowhere") == 2
