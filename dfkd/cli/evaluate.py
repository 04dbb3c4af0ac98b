"""dfkd-evaluate: a classifier and labelled real images -> accuracy, calibration, agreement with its teacher."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dfkd.cli.parse import command
from dfkd.cli.progress import progress, say
from dfkd.config import EvaluateCommand, plain
from dfkd.errors import UsageError
from dfkd.files import make_writable, replace_text

COMMAND = "dfkd-evaluate"
SIZE = 32  # of the images until the classifier, which wants their class names, says its own
SHOWN = 20  # classes up to which the last line of output holds the confusion matrix; --out always does


def run(asked: EvaluateCommand) -> dict[str, Any]:
    """Load, test, write --out where it is given; returns what was measured."""
    from dfkd.evaluation import class_names_of, described, evaluate, learned_from, open_test
    from dfkd.runtime import resolve_device
    from dfkd.teachers import Classifier, load_teacher

    given = asked.classifier.replace(teacher_checkpoint=asked.checkpoint or asked.classifier.checkpoint)
    if given.checkpoint is None and given.teacher is None and not given.clients:
        todo = "give --checkpoint FOLDER, --clients FOLDER FOLDER, or --teacher timm:NAME"
        raise UsageError("no classifier is given", "it is what is tested", todo)
    device = resolve_device(asked.device)
    learned = learned_from(*given.sources, asked.reference)
    images = open_test(asked.data, asked.split, SIZE, learned)
    bare = given.checkpoint is not None and given.checkpoint.is_file()
    named = (class_names_of(asked.data) if bare else ()) or images.class_names  # a test may lack some
    classifier = load_teacher(given, named).freeze(device)
    teacher = Classifier.from_pretrained(asked.reference).freeze(device) if asked.reference else None
    if asked.out is not None:
        make_writable(asked.out.parent)
    say(f"testing {classifier.described()}, on {described(images)}")
    with progress("testing", "img") as watch:
        found = evaluate(classifier, images, teacher, asked.split, asked.limit, watch)
    tested = given.checkpoint or given.teacher or ", ".join(given.clients)
    facts = {"checkpoint": tested, "architecture": classifier.architecture}
    result = {**facts, "data": asked.data, "split": asked.split, "source": described(images), **asdict(found)}
    result["accuracy"] = result.pop("accuracy")  # last, where one looks first
    if asked.out is not None:
        replace_text(asked.out, json.dumps(plain(result), indent=1) + "\n")
    if len(classifier.class_names) > SHOWN:
        del result["confusion"]
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Exit with the command's status."""
    sys.exit(command(EvaluateCommand, run, COMMAND, argv))


if __name__ == "__main__":
    main()
