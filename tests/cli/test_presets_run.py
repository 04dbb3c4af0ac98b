"""Every published preset starts: a few images of a small prior with its teacher, then two steps of its student.

Networks, losses, prompts, views and schedules are the preset's; the prior, the amounts and, for the teachers of 224
pixels while they guide, the size are smaller.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd import teachers
from dfkd.cli import distill, generate
from dfkd.config import presets, section
from dfkd.data import open_folder
from dfkd.teachers import Classifier
from dfkd_engine.priors.prior import Prior
from tests.cli.small_generate import last_line, save_classifier, status_of

DIGITS = tuple(str(digit) for digit in range(10))
SMALL = ("--group", 4, "--batch", 4, "--size", 16, "--device", "cpu")
SHORT = ("--steps", 2, "--batch-size", 3, "--device", "cpu")
# Where a preset leaves the networks open.
TEACHERS = {"demo": "resnet8_half", "cifar10-mini": "resnet20", "fedcado": "resnet8"}
STUDENTS = {"fedcado": "resnet8"}
LARGE = ("domainnet-sketch", "domainnet-quickdraw", "domainnet-fast")  # of 224 pixels


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in presets() if "generate" in presets()[n]],
)
def test_a_preset_runs(
    name: str,
    tmp_path: Path,
    small_prior: Path,
    cached_prior: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Prior, "from_pretrained", cached_prior)
    asked, learns = (section(presets()[name], part) for part in ("generate", "distill"))
    architecture, names = str(asked.get("teacher", TEACHERS.get(name))), tuple(asked.get("classes", DIGITS))
    side = teachers.input_size(architecture)
    teacher = save_classifier(tmp_path / "teacher", 0, names, side, architecture)
    guide = save_classifier(tmp_path / "guide", 0, names, 64, architecture) if name in LARGE else teacher
    argv = ["--preset", name, "--teacher-checkpoint", guide, "--prior", small_prior, "--out", tmp_path / "data", *SMALL]
    each, mixed = 1 + int(asked.get("keep_intermediates", 0)), bool(asked.get("cutmix_every"))
    argv += ["--count", 4 * each, "--shard-size", 4 * each, "--steps", 6 if each > 1 else 3]
    argv += ["--cutmix-every", 2] if mixed else []
    if asked.get("adv_weight"):
        adversary = save_classifier(tmp_path / "adversary", 0, names, 64, str(learns["student"]))
        argv += ["--student-checkpoint", adversary]
    assert status_of(generate.main, *argv) == 0, capsys.readouterr().err
    made = last_line(capsys.readouterr().out)
    classes = [2, 2] if mixed else [1] * 4  # of the trajectories: where they are mixed each has a partner
    assert made["images_written"] == 4 * each and [n for n in made["class_counts"] if n] == [n * each for n in classes]
    own = ("bn_weight", "cls_weight", "adv_weight", "cfg", "prompt", "sampler", "bn_stats", "gradient", "guidance_norm")
    assert_used(tmp_path / "data", asked, *own, "guidance_step", "keep_intermediates", "cutmix_as")
    pool = open_folder(tmp_path / "data")
    assert pool.class_names == names
    last = [record for record in pool.records() if record.step is None]
    assert len(last) == 4 and all((record.partner is None) != mixed for record in last)

    argv = ["--data", tmp_path / "data", "--teacher-checkpoint", teacher, "--out", tmp_path / "student"]
    argv += ["--preset", name] if learns else ["--student", STUDENTS[name]]
    assert status_of(distill.main, *argv, *SHORT) == 0, capsys.readouterr().err
    result = last_line(capsys.readouterr().out)
    assert (result["steps"], result["images"]) == (2, 6)
    student = Classifier.from_pretrained(tmp_path / "student" / "last")
    assert student.architecture == learns.get("student", STUDENTS.get(name)) and student.input_size == side
    assert all(torch.isfinite(value.float()).all() for value in student.state_dict().values())
    assert_used(tmp_path / "student", learns, "lr", "temperature", "augment", "schedule", "mix")


def assert_used(folder: Path, asked: dict[str, Any], *names: str) -> None:
    """The settings that a run recorded are the preset's."""
    used = json.loads((folder / "settings.json").read_text())["options"]
    assert {key: used[key] for key in names if key in asked} == {key: asked[key] for key in names if key in asked}
