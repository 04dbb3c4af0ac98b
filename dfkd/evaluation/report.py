"""The report as data: everything that report.json holds and the page shows, measured from a run's folders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

import dfkd
from dfkd.errors import UsageError
from dfkd.evaluation.accuracy import spread
from dfkd.evaluation.cost import Cost, costs
from dfkd.evaluation.metrics import (
    Band,
    Confidence,
    Confusion,
    TeacherView,
    confidence,
    loss_bands,
    teacher_view,
    top_confusions,
)
from dfkd.evaluation.run_folder import RunFolder
from dfkd.evaluation.tested import Accuracy, Errors, accuracy, errors
from dfkd.evaluation.verdict import Answer, answers
from dfkd.teachers import Classifier

OURS = "guided images"  # their name beside the baselines'


@dataclass(frozen=True)
class ImageFacts:
    """The synthetic images. sure_counts: images per class with a teacher probability above one half, None unknown."""

    count: int
    size: int
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    sure_counts: tuple[int, ...] | None
    confidence: Confidence | None
    losses: dict[str, Band]
    seconds: float | None
    images_per_second: float | None


@dataclass(frozen=True)
class StudentFacts:
    """agreement: with the teacher on held-out synthetic images; real_agreement: on the test images. confusion: there;
    rows are the truth. None for what was not measured.
    """

    architecture: str | None
    steps: int | None
    seconds: float | None
    agreement: float | None
    real_agreement: float | None
    confusion: tuple[tuple[int, ...], ...] | None
    top_confusions: tuple[Confusion, ...]
    log: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Refresh:
    """A student between rounds of images; agreement: with the teacher on held-out ones. None for what is unknown."""

    steps: int | None
    seconds: float | None
    agreement: float | None


@dataclass(frozen=True)
class Report:
    """answers: to what a reader wants to know first. costs: of "teacher" and "student", as far as they were loaded.

    ranking: the baselines that left a folder, best first. teacher_views: the guided images, then those of the baselines
    in that order, {} without the teacher.
    """

    title: str
    version: str
    missing: Mapping[str, str]
    notes: tuple[str, ...]
    answers: tuple[Answer, ...]
    accuracy: Accuracy
    errors: Errors | None
    costs: dict[str, Cost]
    ranking: tuple[str, ...]
    images: ImageFacts
    teacher_architecture: str | None
    teacher_views: dict[str, TeacherView]
    student: StudentFacts | None
    refreshes: tuple[Refresh, ...]
    seconds: dict[str, float]
    settings: dict[str, Mapping[str, Any]]


def measure(run: RunFolder, teacher: Classifier | None, judged: int, student: Classifier | None = None) -> Report:
    """Measure a run. The teacher, where it is at hand, judges `judged` images of each set, spread over classes and ids.

    Raises UsageError where teacher and images disagree about the classes.
    """
    check_classes(run.synthetic.pool.class_names, teacher)
    tested, wrong = accuracy(run), errors(run)
    ranking = sorted(run.baselines, key=lambda name: -tested.baselines.get(name, 0.0))
    spent = costs({name: one for name, one in (("teacher", teacher), ("student", student)) if one is not None})
    return Report(
        title=run.title,
        version=dfkd.__version__,
        missing=run.missing,
        notes=tuple(_notes(run, teacher)),
        answers=answers(tested, wrong, spent),
        accuracy=tested,
        errors=wrong,
        costs=spent,
        ranking=tuple(ranking),
        images=_images(run),
        teacher_architecture=teacher.architecture if teacher else None,
        teacher_views=_views(run, ranking, teacher, judged) if teacher and judged else {},
        student=_student(run),
        refreshes=tuple(Refresh(*(one.result.get(f.name) for f in fields(Refresh))) for one in run.refreshes),
        seconds=_seconds(run),
        settings={
            part: found.settings
            for part, found in (("teacher", run.teacher), ("synthetic", run.synthetic), ("student", run.student))
            if found and found.settings
        },
    )


def check_classes(names: Sequence[str], teacher: Classifier | None) -> None:
    """Raise UsageError where a teacher is of other classes than images of these, or of another order."""
    if teacher is not None and teacher.class_names != tuple(names):
        raise UsageError(
            "teacher and images disagree about the classes",
            f"teacher: {', '.join(teacher.class_names[:10])}; images: {', '.join(names[:10])}",
            "give the teacher that guided these images",
        )


def _notes(run: RunFolder, teacher: Classifier | None) -> list[str]:
    """What a reader must know before trusting the page: parts that do not belong together."""
    notes = []
    guide = run.synthetic.pool.settings.get("teacher_digest")
    if teacher is not None and guide is not None and teacher.digest() != guide:
        notes.append("The teacher given is not the one that guided these images (their digests differ).")
    result = run.student.result if run.student else {}
    learned = result.get("run", {}).get("data")
    if learned is not None and learned != run.synthetic.pool.digest[:16]:
        notes.append("The student was distilled from other images than these (their digests differ).")
    return notes


def _images(run: RunFolder) -> ImageFacts:
    pool, records = run.synthetic.pool, run.synthetic.records
    classes, seconds = len(pool.class_names), run.synthetic.seconds
    probability = np.array([record.teacher_probability for record in records])
    # A softmax is never exactly 0 everywhere: such a folder was written by something that asked no teacher.
    known = bool(probability.any())
    sure = torch.bincount(pool.labels[torch.from_numpy(probability > 0.5)], minlength=classes)
    return ImageFacts(
        count=len(records),
        size=pool.image_size,
        class_names=pool.class_names,
        class_counts=tuple(torch.bincount(pool.labels, minlength=classes).tolist()),
        sure_counts=tuple(sure.tolist()) if known else None,
        confidence=confidence(probability) if known else None,
        losses=loss_bands([record.loss_curve for record in records]),
        seconds=round(seconds, 3) if seconds else None,
        images_per_second=round(len(records) / seconds, 3) if seconds else None,
    )


def _views(run: RunFolder, ranking: Sequence[str], teacher: Classifier, judged: int) -> dict[str, TeacherView]:
    pools = {OURS: run.synthetic.pool}
    pools |= {name: pool for name in ranking if (pool := run.baselines[name].images) is not None}
    return {
        name: teacher_view(teacher, pool.read, pool.labels, spread(pool.labels, judged))
        for name, pool in pools.items()
        if pool.class_names == teacher.class_names
    }


def _student(run: RunFolder) -> StudentFacts | None:
    if run.student is None:
        return None
    result, names = run.student.result, run.synthetic.pool.class_names
    tested = run.evaluation.get("student", result)
    matrix = tested.get("confusion")
    return StudentFacts(
        architecture=result.get("run", {}).get("student"),
        steps=result.get("steps"),
        seconds=result.get("seconds"),
        agreement=result.get("agreement"),
        real_agreement=run.evaluation.get("student", {}).get("agreement"),
        confusion=tuple(tuple(row) for row in matrix) if matrix else None,
        top_confusions=top_confusions(matrix, names) if matrix else (),
        log=run.student.log,
    )


def _seconds(run: RunFolder) -> dict[str, float]:
    """Seconds by stage, of those that took some."""
    parts = {
        "teacher": run.teacher.result.get("seconds") if run.teacher else None,
        "synthesis": run.synthetic.seconds,
        "distillation": run.student.result.get("seconds") if run.student else None,
    }
    trained = [base.student.result.get("seconds") or 0 for base in run.baselines.values() if base.student]
    parts |= {f"images of {name}": base.seconds for name, base in run.baselines.items()}
    parts["baselines' students"] = sum(trained)
    parts["refreshes"] = sum(one.result.get("seconds") or 0 for one in run.refreshes)
    return {stage: float(value) for stage, value in parts.items() if value}
