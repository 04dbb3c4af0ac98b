"""What a classifier and its teacher answered on the same labelled images, and what can be counted from it.

Calibration is the expected calibration error (Guo et al., arXiv:1706.04599): images in BINS equal bins of their highest
probability, then the mean of |accuracy - mean probability| over the bins, weighted by their images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BINS = 15


@dataclass(frozen=True)
class Answers:
    """Answers on N labelled images; class numbers are places in `class_names`.

    rows: int64 [N], the images' places in the set. truth, own, theirs: int64 [N], the class, the classifier's answer
    and the teacher's. sure, teacher_sure: float32 [N], their highest probabilities in 0..1. None without a teacher.
    """

    class_names: tuple[str, ...]
    rows: Tensor
    truth: Tensor
    own: Tensor
    sure: Tensor
    theirs: Tensor | None = None
    teacher_sure: Tensor | None = None

    @property
    def right(self) -> Tensor:
        """bool [N]: whether the classifier's answer is the truth."""
        return self.own == self.truth

    @property
    def teacher_right(self) -> Tensor | None:
        """bool [N]: whether the teacher's answer is the truth; None without a teacher."""
        return None if self.theirs is None else self.theirs == self.truth


@dataclass(frozen=True)
class Outcomes:
    """Counts of images by who is right; same_wrong: of both_wrong, those on which the two give the same answer."""

    both_right: int
    student_only: int
    teacher_only: int
    both_wrong: int
    same_wrong: int


@dataclass(frozen=True)
class Bin:
    """Images of nearly the same highest probability: its mean, and the share of right answers, both in 0..1."""

    images: int
    probability: float
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """A test of a classifier on `images` labelled images; shares are in 0..1; of a teacher None without one.

    per_class            accuracy by class, in the classifier's order; None for a class without images
    agreement            share of images on which classifier and teacher answer the same
    outcomes             how many images which of the two has right
    calibration          expected calibration error
    reliability          the bins behind it that hold images, by rising probability
    confusion            counts; rows are the truth, columns the answer, both in the classifier's order
    teacher_accuracy, teacher_per_class, teacher_calibration, teacher_reliability    the same of the teacher
    """

    accuracy: float
    per_class: dict[str, float | None] = field(repr=False)
    agreement: float | None
    teacher_accuracy: float | None
    calibration: float
    confusion: tuple[tuple[int, ...], ...] = field(repr=False)
    images: int
    outcomes: Outcomes | None = None
    reliability: tuple[Bin, ...] = field(default=(), repr=False)
    teacher_per_class: dict[str, float | None] | None = field(default=None, repr=False)
    teacher_calibration: float | None = None
    teacher_reliability: tuple[Bin, ...] | None = field(default=None, repr=False)


def summary(answers: Answers) -> Evaluation:
    """Everything that is counted from answers on at least one image."""
    names, truth = answers.class_names, answers.truth
    matrix = _confusion(truth, answers.own, len(names))
    found = Evaluation(
        accuracy=_share(answers.right),
        per_class=dict(zip(names, class_accuracy(matrix), strict=True)),
        agreement=None,
        teacher_accuracy=None,
        calibration=calibration_error(answers.sure, answers.right),
        confusion=tuple(map(tuple, matrix)),
        images=len(truth),
        reliability=reliability(answers.sure, answers.right),
    )
    theirs, sure, right = answers.theirs, answers.teacher_sure, answers.teacher_right
    if theirs is None or sure is None or right is None:
        return found
    of_teacher = {
        "agreement": _share(theirs == answers.own),
        "outcomes": outcomes(answers),
        "teacher_accuracy": _share(right),
        "teacher_per_class": dict(zip(names, class_accuracy(_confusion(truth, theirs, len(names))), strict=True)),
        "teacher_calibration": calibration_error(sure, right),
        "teacher_reliability": reliability(sure, right),
    }
    return Evaluation(**{**vars(found), **of_teacher})


def outcomes(answers: Answers) -> Outcomes | None:
    """Who is right how often; None without a teacher."""
    own, theirs = answers.right, answers.teacher_right
    if theirs is None:
        return None
    neither = ~own & ~theirs
    same = neither & (answers.own == answers.theirs)
    return Outcomes(*(int(part.sum()) for part in (own & theirs, own & ~theirs, ~own & theirs, neither, same)))


def reliability(probabilities: Tensor, right: Tensor) -> tuple[Bin, ...]:
    """The bins of highest probabilities [N] in 0..1 that hold images; right: bool [N], whether the answer was."""
    bins = (probabilities.double() * BINS).ceil().long().clamp(1, BINS) - 1
    found = []
    for number in range(BINS):
        if (inside := bins == number).any():
            found.append(Bin(int(inside.sum()), _share(probabilities[inside]), _share(right[inside])))
    return tuple(found)


def calibration_error(probabilities: Tensor, right: Tensor) -> float:
    """Expected calibration error of highest probabilities [N] in 0..1; right: bool [N], whether the answer was."""
    bins = reliability(probabilities, right)
    return sum(one.images * abs(one.accuracy - one.probability) for one in bins) / len(probabilities)


def class_accuracy(matrix: Sequence[Sequence[int]]) -> tuple[float | None, ...]:
    """Share of each row (truth) on the diagonal; None for a class without images."""
    return tuple(row[i] / sum(row) if sum(row) else None for i, row in enumerate(matrix))


def _confusion(truth: Tensor, answers: Tensor, classes: int) -> list[list[int]]:
    matrix: list[list[int]] = torch.bincount(truth * classes + answers, minlength=classes**2).view(classes, -1).tolist()
    return matrix


def _share(values: Tensor) -> float:
    return float(values.double().mean())
