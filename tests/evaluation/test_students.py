"""The test of a run's students: what is kept of it for the report."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd.config import EvaluateCommand
from dfkd.evaluation import students
from dfkd.evaluation.answers import Answers
from dfkd.evaluation.students import examine, surest_mistakes
from tests.evaluation.test_accuracy import NAMES, judge

COLOURS = {"red": (200, 0, 0), "green": (0, 150, 0), "blue": (0, 0, 250)}


@pytest.fixture
def asked(tmp_path: Path) -> EvaluateCommand:
    """Two images of each colour, of which one of "red" is green."""
    for name in NAMES:
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            colour = COLOURS["green" if (name, i) == ("red", 1) else name]
            Image.new("RGB", (4, 4), colour).save(tmp_path / "images" / name / f"{i}.png")
    return EvaluateCommand(data=f"imagefolder:{tmp_path / 'images'}", split="all", device="cpu")


def test_what_is_kept(asked: EvaluateCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"": judge(factor=3.0), "noise": judge(order=(1, 0, 2))}
    found = examine(tmp_path, both, judge(), asked, {"seed": 1})
    assert json.loads((tmp_path / "evaluation.json").read_text())["student"]["accuracy"] == pytest.approx(5 / 6)
    right = np.load(tmp_path / "evaluation/right.npz")
    assert {name: int(right[name].sum()) for name in right.files} == {"student": 5, "teacher": 5, "baselines/noise": 3}
    assert right["student"].shape == (6,) and right["student"].dtype == bool
    (mistake,) = found["mistakes"]
    assert (mistake["truth"], mistake["student"], mistake["teacher"]) == ("red", "green", "green")
    assert mistake["student_probability"] > mistake["teacher_probability"] > 1 / 3
    picture = Image.open(tmp_path / "evaluation/mistakes.png")
    assert picture.size == (4, 4) and picture.getpixel((2, 2)) == COLOURS["green"]

    monkeypatch.setattr(students, "ask", lambda *given: pytest.fail("tested again"))
    assert examine(tmp_path, both, judge(), asked, {"seed": 1})["images"] == 6
    with pytest.raises(pytest.fail.Exception):
        examine(tmp_path, both, judge(), asked, {"seed": 2})


def test_a_student_without_mistakes(asked: EvaluateCommand, tmp_path: Path) -> None:
    (tmp_path / "images" / "red" / "1.png").unlink()
    assert examine(tmp_path, {"": judge()}, judge(), asked, {})["mistakes"] == []
    assert (tmp_path / "evaluation/mistakes.png").exists()


def test_the_surest_mistakes_come_first_and_are_few() -> None:
    sure = torch.tensor([0.5, 0.9, 0.7, 0.9, 0.99])
    answers = Answers(NAMES, torch.arange(5), torch.tensor([0, 0, 0, 0, 1]), torch.ones(5, dtype=torch.int64), sure)
    assert surest_mistakes(answers).tolist() == [1, 3, 2, 0]
    many = Answers(NAMES, torch.arange(99), torch.zeros(99).long(), torch.ones(99).long(), torch.ones(99))
    assert surest_mistakes(many).tolist() == list(range(students.MOST))
