"""dfkd-distill: synthetic images and a frozen teacher -> a student."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dfkd.cli.parse import command, save_settings
from dfkd.cli.progress import progress, say
from dfkd.config import DistillCommand
from dfkd.logs import LOG

if TYPE_CHECKING:
    from dfkd.data import Images
    from dfkd.teachers import Classifier
    from dfkd.training.world import World

COMMAND = "dfkd-distill"


def run(asked: DistillCommand) -> dict[str, Any] | None:
    """Train what is not trained yet, test, write OUT/result.json; None in all processes but the first."""
    from dfkd.training.world import join

    with join(asked.distill.train.compute.device) as world:
        return run_in(world, asked)


def run_in(world: "World", asked: DistillCommand) -> dict[str, Any] | None:
    """`run` as one of the processes of `world`."""
    from dfkd import teachers
    from dfkd.data import ImageFiles, JoinedImages, open_data
    from dfkd.training.distill import check, distill, warm_start

    config = asked.distill
    teachers.check(config.student)
    check(config, world)
    init = None if asked.init is None else warm_start(asked.init, config)
    if asked.test is not None:
        from dfkd.evaluation import check_data

        check_data("--test", asked.test, asked.test_split)
    data = open_data(asked.data, config.on_bad_sample)
    teacher = teachers.load_teacher(asked.teacher, data.class_names)
    if asked.test is not None:
        # Classes and ends of files are looked at here; no pixel is used before the student is trained.
        from dfkd.evaluation.accuracy import match_classes

        match_classes(_test_images(asked, teacher.input_size), teacher.class_names)
    save = partial(save_settings, asked, asked.out, COMMAND)
    speak = say if world.first else (lambda text: None)
    speak(f"teacher: {teacher.described()}")
    for part in data.parts if isinstance(data, JoinedImages) else ():
        if isinstance(part, ImageFiles) and part.listing.passed_over:
            speak(part.listing.described())
    with progress("distilling", "img", world.first, asked.out / LOG) as draw:
        student = distill(
            data, teacher, config, asked.out, student=init, world=world, progress=draw, say=speak, on_new=save
        )
    return tested(asked, student) if world.first else None


def tested(asked: DistillCommand, student: "Classifier") -> dict[str, Any]:
    """OUT/result.json with the accuracies on real images; these are read only where --test was not answered before.

    accuracy and confusion (rows: truth) are the last student's, best_accuracy the best one's; None without --test.
    """
    from dfkd.teachers import Classifier
    from dfkd.training.folder import read_result, write_result

    result = read_result(asked.out) or {}
    named = {"test": asked.test, "test_split": asked.test_split}
    if named.items() <= result.items():
        return result
    found: dict[str, Any] = {"test_images": 0, "accuracy": None, "best_accuracy": None, "confusion": None}
    found["test_source"] = None
    if asked.test is not None:
        from dfkd.evaluation import described, evaluate

        best = Classifier.from_pretrained(asked.out / "best").to(student.device)
        images = _test_images(asked, student.input_size)
        last, other = (evaluate(one, images) for one in (student, best))
        found = {"test_images": last.images, "accuracy": last.accuracy, "best_accuracy": other.accuracy}
        found["test_source"] = described(images)
        found["confusion"] = [list(row) for row in last.confusion]
    return write_result(asked.out, result.pop("run"), {**result, **named, **found})


def _test_images(asked: DistillCommand, size: int) -> "Images":
    from dfkd.evaluation import learned_from, open_test

    assert asked.test is not None
    return open_test(asked.test, asked.test_split, size, learned_from(*asked.teacher.sources))


def main(argv: Sequence[str] | None = None) -> None:
    sys.exit(command(DistillCommand, run, COMMAND, argv))


if __name__ == "__main__":
    main()
