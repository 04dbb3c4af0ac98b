"""How good a classifier is on labelled real images, alone and beside its teacher."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dfkd.data import Images
from dfkd.errors import UsageError
from dfkd.evaluation.answers import Answers, Evaluation, summary
from dfkd.evaluation.real_data import open_images
from dfkd.teachers import Classifier

ROWS = 250  # images a forward pass


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
    return summary(ask(classifier, data, teacher, split, limit, progress))


@torch.no_grad()
def ask(
    classifier: Classifier,
    data: str | Images,
    teacher: Classifier | None = None,
    split: str = "test",
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """What the classifier, and the teacher, answer on labelled images. Arguments and errors as of `evaluate`."""
    pools: dict[int, Images] = {}
    judges = [judge.eval() for judge in (classifier, teacher) if judge is not None]
    for judge in judges:  # each sees the images resized from the file to its own size
        if judge.input_size not in pools:
            pools[judge.input_size] = open_images(data, split, judge.input_size) if isinstance(data, str) else data
    images = pools[classifier.input_size]
    truth = match_classes(images, classifier)[images.labels]
    rows = evenly(len(truth), limit or len(truth))
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in judges]
    done = 0
    for part in torch.split(rows, ROWS):
        for number, judge in enumerate(judges):
            highest, answer = judge(pools[judge.input_size].read(part)).float().softmax(1).cpu().max(1)
            found[number].append((highest, answer))
        done += len(part)
        if progress is not None:
            progress(done, len(rows))
    (sure, own), *others = ([torch.cat(column) for column in zip(*parts, strict=True)] for parts in found)
    asked = Answers(classifier.class_names, rows, truth[rows], own, sure)
    if teacher is None:
        return asked
    teacher_sure, theirs = others[0]
    return replace(asked, theirs=_translated(teacher, classifier)[theirs], teacher_sure=teacher_sure)


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
