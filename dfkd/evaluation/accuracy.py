"""How good a classifier is on labelled real images, alone and beside its teacher."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dfkd.data import ImageFiles, Images, some_names
from dfkd.errors import UsageError
from dfkd.evaluation.answers import Answers, Evaluation, summary
from dfkd.evaluation.real_data import learned_from, open_test
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

    data: a source of dfkd.evaluation.open_test ("digits-on-photos", "imagefolder:PATH", ...) and its split, or images
    that are open. Classes are matched by name; there may be fewer of them than the classifier's.
    teacher: of the same classes, to measure agreement with. limit: images at most, spread over the classes and the set.
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
    judges = [judge.eval().tried() for judge in (classifier, teacher) if judge is not None]
    images = data
    if isinstance(images, str):
        learned = learned_from(*(source for judge in judges for source in judge.sources))
        images = open_test(images, split, classifier.input_size, learned)
    # Each sees the images resized from the file to its own size.
    sizes = {judge.input_size for judge in judges}
    pools = {size: images.fitted(size) if isinstance(images, ImageFiles) else images for size in sizes}
    truth = match_classes(images, classifier.class_names)[images.labels]
    rows = spread(truth, limit or len(truth)).sort().values
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


def spread(labels: Tensor, most: int) -> Tensor:
    """At most `most` positions int64 of labels int64 [N], by class: of each in proportion, spread evenly over its own.

    Positions at equal steps would not do: images whose classes take turns may lose some of them altogether.
    """
    return labels.argsort(stable=True)[evenly(len(labels), most)]


def match_classes(images: Images, class_names: Sequence[str]) -> Tensor:
    """int64: the images' class number -> that of a classifier of these classes, by name; -1 for classes without images.

    Raises UsageError for images of a class that it does not know.
    """
    places = {name: place for place, name in enumerate(class_names)}
    new = torch.tensor([places.get(name, -1) for name in images.class_names])
    unknown = [images.class_names[label] for label in sorted(set(images.labels.tolist())) if new[label] < 0]
    if unknown:
        raise UsageError(
            f"the images have the classes {some_names(unknown)}",
            f"the classifier knows {some_names(class_names)}",
            "give images of its classes, or its class names in the order of its logits",
        )
    return new


def _translated(teacher: Classifier, classifier: Classifier) -> Tensor:
    """int64: the teacher's class number -> the classifier's, by name."""
    if set(teacher.class_names) != set(classifier.class_names):
        theirs, own = some_names(teacher.class_names), some_names(classifier.class_names)
        why = f"the teacher knows {theirs}; the classifier knows {own}"
        raise UsageError("teacher and classifier have different classes", why, "give the teacher of this student")
    return torch.tensor([classifier.class_names.index(name) for name in teacher.class_names])
