"""The test of a run's students on real images, with what its report needs of them, since that reads no real image.

OUT/evaluation.json          what was counted of the student and of every baseline's
OUT/evaluation/right.npz     bool [N] by "student", "teacher", "baselines/NAME": right on each test image or not
OUT/evaluation/mistakes.png  the student's surest mistakes side by side, as `mistakes` of evaluation.json has them
"""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dfkd.config import EvaluateCommand, plain
from dfkd.data import ImageFiles, Images, read_all
from dfkd.data.contact_sheet import LARGE, SMALL
from dfkd.evaluation.accuracy import ask
from dfkd.evaluation.answers import Answers, summary
from dfkd.evaluation.real_data import described, learned_from, open_test
from dfkd.evaluation.run_folder import EVALUATION, MISTAKES, RIGHT
from dfkd.files import replace_file, replace_text
from dfkd.runtime import resolve_device
from dfkd.teachers import Classifier

MOST = 24  # mistakes that are shown


@dataclass(frozen=True)
class Mistake:
    """A test image that the student has wrong: classes by name, and the probability that each gives its answer."""

    truth: str
    student: str
    student_probability: float
    teacher: str
    teacher_probability: float


def examine(
    out: Path,
    students: Mapping[str, Classifier],
    teacher: Classifier,
    asked: EvaluateCommand,
    of: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """What evaluation.json of the run's folder `out` holds; measured anew where it is not of what `of` says.

    students: by the name of the baseline, "" for the run's own. of: what a test follows from, in JSON's types.
    """
    path = out / EVALUATION
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known.get("of") == of and (out / RIGHT).exists() and (out / MISTAKES).exists():
        return known
    device = resolve_device(asked.device)
    teacher.freeze(device)
    images = open_test(asked.data, asked.split, teacher.input_size, learned_from(*teacher.sources))
    answers = {
        name: ask(student.freeze(device), images, teacher, asked.split, asked.limit, progress)
        for name, student in students.items()
    }
    own, tests = answers[""], {name: asdict(summary(one)) for name, one in answers.items()}
    worst = surest_mistakes(own)
    _keep(out / RIGHT, answers)
    _draw(out / MISTAKES, images, students[""].input_size, own.rows[worst])
    found = {
        "data": asked.data,
        "split": asked.split,
        "images": len(own.rows),
        "source": described(images),
        "student": tests.pop(""),
        "baselines": tests,
        "mistakes": [asdict(mistake) for mistake in _described(own, worst)],
        "of": of,
    }
    replace_text(path, json.dumps(plain(found), indent=1) + "\n")
    return found


def surest_mistakes(answers: Answers) -> Tensor:
    """int64: places of at most MOST wrong answers among N, the surest first, then in the order of the images."""
    wrong = (~answers.right).nonzero()[:, 0]
    order = answers.sure[wrong].argsort(descending=True, stable=True)
    return wrong[order][:MOST]


def _described(answers: Answers, places: Tensor) -> list[Mistake]:
    assert answers.theirs is not None and answers.teacher_sure is not None
    names = answers.class_names
    columns = (answers.truth, answers.own, answers.sure, answers.theirs, answers.teacher_sure)
    rows = zip(*(column[places].tolist() for column in columns), strict=True)
    return [
        Mistake(names[truth], names[own], sure, names[theirs], teacher_sure)
        for truth, own, sure, theirs, teacher_sure in rows
    ]


def _keep(path: Path, answers: Mapping[str, Answers]) -> None:
    right: dict[str, Any] = {
        f"baselines/{name}" if name else "student": one.right.numpy() for name, one in answers.items()
    }
    if (teachers := answers[""].teacher_right) is not None:
        right["teacher"] = teachers.numpy()
    data = io.BytesIO()
    np.savez_compressed(data, **right)
    path.parent.mkdir(exist_ok=True)
    replace_file(path, lambda file: file.write(data.getvalue()))


def _draw(path: Path, images: Images, side: int, rows: Tensor) -> None:
    """Thumbnails beside one another; one grey tile where there is no mistake."""
    side = side if side <= SMALL else LARGE
    images = images.fitted(side) if isinstance(images, ImageFiles) else images
    tiles = read_all(images, rows, side) if len(rows) else torch.full((1, 3, side, side), 128, dtype=torch.uint8)
    strip = tiles.permute(2, 0, 3, 1).flatten(1, 2).contiguous().numpy()
    replace_file(path, lambda file: Image.fromarray(strip).save(file, "PNG"))
