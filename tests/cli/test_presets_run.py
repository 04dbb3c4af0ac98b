"""Every published preset starts: a few images of a small prior with its teacher, then two steps of its student.

Networks, losses, prompts, views and schedules are the preset's; the prior, the amounts and, for the teachers of 224
pixels while they guide, the size are smaller.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd import teachers
from dfkd.cli import distill, generate
from dfkd.presets import PRESETS
from dfkd.data.shards import open_folder
from dfkd.teachers import Classifier, checkpoint
from tests.cli.small_generate import last_line, status_of

DIGITS = tuple(str(digit) for digit in range(10))
SMALL = ("--count", 4, "--group", 4, "--batch", 4, "--shard-size", 4, "--steps", 2, "--size", 16, "--device", "cpu")
SHORT = ("--steps", 2, "--epochs", "none", "--batch-size", 3, "--device", "cpu")
# Where a preset leaves the networks open.
TEACHERS = {"demo": "resnet8_half", "fedcado": "resnet8"}
STUDENTS = {"fedcado": "resnet8"}
LARGE = ("domainnet-sketch", "domainnet-quickdraw")  # of 224 pixels


def save(folder: Path, name: str, names: tuple[str, ...], size: int) -> Path:
    torch.manual_seed(0)
    half = (0.5, 0.5, 0.5)
    checkpoint.save(folder, Classifier(teachers.build(name, len(names)), name, names, size, half, half))
    return folder


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in PRESETS])
def test_a_preset_runs(
    name: str, tmp_path: Path, small_prior: Path, cached_load_prior: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("dfkd.cli.prepare.load_prior", cached_load_prior)
    asked, learns = PRESETS[name].generate, PRESETS[name].distill
    architecture = str(asked.get("teacher", TEACHERS.get(name)))
    names = asked.get("classes", DIGITS)
    assert isinstance(names, tuple) and len(names) == 10
    side = teachers.input_size(architecture)
    teacher = save(tmp_path / "teacher", architecture, names, side)
    guide = save(tmp_path / "guide", architecture, names, 64) if name in LARGE else teacher
    argv = ["--preset", name, "--teacher-checkpoint", guide, "--prior", small_prior, "--out", tmp_path / "data", *SMALL]
    if asked.get("adv_weight"):
        student = save(tmp_path / "adversary", str(learns["student"]), names, 64)
        argv += ["--student-checkpoint", student]
    assert status_of(generate.main, *argv) == 0, capsys.readouterr().err
    made = last_line(capsys.readouterr().out)
    assert made["images_written"] == 4 and made["class_counts"] == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    said = json.loads((tmp_path / "data" / "settings.json").read_text())["options"]
    wanted = {"bn_weight", "cls_weight", "adv_weight", "cfg", "prompt", "sampler", "bn_stats", "noise_edit_steps"}
    assert {key: said[key] for key in wanted & asked.keys()} == {key: asked[key] for key in wanted & asked.keys()}
    pool = open_folder(tmp_path / "data")
    assert pool.class_names == names and pool.image_size == 16

    argv = ["--data", tmp_path / "data", "--teacher-checkpoint", teacher, "--out", tmp_path / "student", *SHORT]
    argv += ["--preset", name] if learns else ["--student", STUDENTS[name]]
    assert status_of(distill.main, *argv) == 0, capsys.readouterr().err
    result = last_line(capsys.readouterr().out)
    assert (result["steps"], result["images"]) == (2, 6)
    student = checkpoint.load(None, tmp_path / "student" / "last")
    assert student.architecture == learns.get("student", STUDENTS.get(name)) and student.input_size == side
    assert all(torch.isfinite(value.float()).all() for value in student.module.state_dict().values())
    used = json.loads((tmp_path / "student" / "settings.json").read_text())["options"]
    assert {key: used[key] for key in ("lr", "temperature", "augment") if key in learns} == {
        key: learns[key] for key in ("lr", "temperature", "augment") if key in learns
    }
