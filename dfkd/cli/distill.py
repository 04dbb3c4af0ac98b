"""dfkd-distill: synthetic images and a frozen teacher -> a student."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfkd.cli.parse import command, save_settings
from dfkd.cli.progress import progress, say
from dfkd.config import DistillCommand
from dfkd.errors import UsageError
from dfkd.files import make_writable

if TYPE_CHECKING:
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
    from dfkd.data import open_data
    from dfkd.training.distill import check, distill
    from dfkd.training.folder import holds_run

    config = asked.distill
    teachers.check(config.student)
    check(config, world)
    _check_test(asked.test)
    data = open_data(asked.data, config.on_bad_sample)
    teacher = teachers.load_teacher(asked.teacher, data.class_names)
    if world.first and not (config.train.resume and holds_run(asked.out)):
        make_writable(asked.out)
        save_settings(asked, asked.out, COMMAND)
    speak = say if world.first else (lambda text: None)
    with progress("distilling", "img", shown=world.first) as draw:
        student = distill(data, teacher, config, asked.out, world=world, progress=draw, say=speak)
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
    if asked.test is not None:
        # Imported here and not above: until now nothing in this process could read real images.
        from dfkd.evaluation import evaluate

        best = Classifier.from_pretrained(asked.out / "best").to(student.device)
        last, other = (evaluate(one, asked.test, split=asked.test_split) for one in (student, best))
        found = {"test_images": last.images, "accuracy": last.accuracy, "best_accuracy": other.accuracy}
        found["confusion"] = [list(row) for row in last.confusion]
    return write_result(asked.out, result.pop("run"), {**result, **named, **found})


def _check_test(name: str | None) -> None:
    """Raise UsageError for what can be known of a test without reading it."""
    path = (name or "").partition(":")[2]
    if path and "{split}" not in path and not Path(path).exists():
        raise UsageError(f"--test {name}", f"there is no {path}", "correct the path")


def main(argv: Sequence[str] | None = None) -> None:
    sys.exit(command(DistillCommand, run, COMMAND, argv))


if __name__ == "__main__":
    main()
