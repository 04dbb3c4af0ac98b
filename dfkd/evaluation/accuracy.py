"""How good a classifier is on labelled real images: accuracy, calibration, and agreement with its teacher.

Calibration is the expected calibration error (Guo et al., arXiv:1706.04599): images in BINS equal bins of their highest
probability, then the mean of |accuracy - mean probability| over the bins, weighted by their images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dfkd.data import Images
from dfkd.errors import UsageError
from dfkd.evaluation.real_data import open_images
from dfkd.teachers import Classifier

BINS = 15
ROWS = 250  # images a forward pass


@dataclass(frozen=True)
class Evaluation:
    """A test of a classifier on `images` labelled images; shares are in 0..1.

    per_class         accuracy by class, in the classifier's order; None for a class without images
    agreement         share of images on which classifier and teacher answer the same; None without a teacher
    teacher_accuracy  of the teacher on the same images; None without a teacher
    calibration       expected calibration error
    confusion         counts; rows are the truth, columns the answer, both in the classifier's order
    """

    accuracy: float
    per_class: dict[str, float | None] = field(repr=False)
    agreement: float | None
    teacher_accuracy: float | None
    calibration: float
    confusion: tuple[tuple[int, ...], ...] = field(repr=False)
    images: int


@torch.no_grad()
def evaluate(
    classifier: Classifier,
    data: str | Images,
    teacher: Classifier | None = None,
    split: str = "test",
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Test a classifier, in evaluation mode and where it is, on labelled images.

    data: a source of dfkd.evaluation.open_images ("digits-on-photos", "imagefolder:PATH", ...) and its split, or images
    that are open. Classes are matched by name; there may be fewer of them than the classifier's.
    teacher: of the same classes, to measure agreement with. limit: images at most, spread evenly over the set.
    progress: called with (done, total) images.
    Raises UsageError: no such data, a class that a classifier does not know, an image that cannot be read.
    """
    pools: dict[int, Images] = {}
    judges = [judge.eval() for judge in (classifier, teacher) if judge is not None]
    for judge in judges:  # each sees the images resized from the file to its own size
        if judge.input_size not in pools:
            pools[judge.input_size] = open_images(data, split, judge.input_size) if isinstance(data, str) else data
    images = pools[classifier.input_size]
    truth = match_classes(images, classifier)[images.labels]
    rows = evenly(len(truth), limit or len(truth))
    answers: list[list[Tensor]] = [[] for _ in judges]
    sure: list[Tensor] = []
    for part in torch.split(rows, ROWS):
        for number, judge in enumerate(judges):
            probabilities = judge(pools[judge.input_size].read(part)).float().softmax(1).cpu()
            highest, answer = probabilities.max(1)
            answers[number].append(answer)
            sure += [highest] if judge is classifier else []
        if progress is not None:
            progress(sum(map(len, answers[0])), len(rows))
    truth, own = truth[rows], torch.cat(answers[0])
    classes = len(classifier.class_names)
    matrix = torch.bincount(truth * classes + own, minlength=classes**2).view(classes, classes).tolist()
    agreement = teacher_accuracy = None
    if teacher is not None:
        theirs = _translated(teacher, classifier)[torch.cat(answers[1])]
        agreement, teacher_accuracy = _share(theirs == own), _share(theirs == truth)
    return Evaluation(
        accuracy=_share(own == truth),
        per_class=dict(zip(classifier.class_names, class_accuracy(matrix), strict=True)),
        agreement=agreement,
        teacher_accuracy=teacher_accuracy,
        calibration=calibration_error(torch.cat(sure), own == truth),
        confusion=tuple(map(tuple, matrix)),
        images=len(rows),
    )


def calibration_error(probabilities: Tensor, right: Tensor) -> float:
    """Expected calibration error of highest probabilities [N] in 0..1; right: bool [N], whether the answer was."""
    bins = (probabilities.double() * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, right.double() - probabilities.double())
    return float(gaps.abs().sum() / len(probabilities))


def class_accuracy(matrix: Sequence[Sequence[int]]) -> tuple[float | None, ...]:
    """Share of each row (truth) on the diagonal; None for a class without images."""
    return tuple(row[i] / sum(row) if sum(row) else None for i, row in enumerate(matrix))


def evenly(total: int, most: int) -> Tensor:
    """At most `most` positions int64 spread evenly over `total`, ascending, without repetition."""
    count = min(total, most)
    return torch.arange(count) * total // max(count, 1)


def match_classes(images: Images, classifier: Classifier) -> Tensor:
    """int64: the images' class number -> the classifier's, by name. Raises UsageError for one that it does not know."""
    unknown = [name for name in images.class_names if name not in classifier.class_names]
    if unknown:
        raise UsageError(
            f"the images have the classes {_some(unknown)}",
            f"the classifier knows {_some(classifier.class_names)}",
            "give images of its classes, or its class names in the order of its logits",
        )
    return torch.tensor([classifier.class_names.index(name) for name in images.class_names])


def _translated(teacher: Classifier, classifier: Classifier) -> Tensor:
    """int64: the teacher's class number -> the classifier's, by name."""
    if set(teacher.class_names) != set(classifier.class_names):
        why = f"the teacher knows {_some(teacher.class_names)}; the classifier knows {_some(classifier.class_names)}"
        raise UsageError("teacher and classifier have different classes", why, "give the teacher of this student")
    return torch.tensor([classifier.class_names.index(name) for name in teacher.class_names])


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:10]) + (f", ... ({len(names)})" if len(names) > 10 else "")


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
