"""The whole job in one folder: teacher, images, student, baselines, test and report, from the sections of one file.

    job = read_job(tomllib.loads(text), Path("runs/mine"))     # every section checked, before any work
    run_job(job)                                               # goes on where it was stopped

OUT/teacher                          trained, unless the file names one that exists
OUT/synthetic, OUT/student           the guided images and the student that learned from them
OUT/rounds/NNN/student               with [rounds]: the student that was refreshed in between
OUT/baselines/NAME/...               the same for every baseline
OUT/evaluation.json, OUT/evaluation  the students' tests on real images
OUT/report                           the page
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dfkd.config import plain
from dfkd.data import MANIFEST, open_folder
from dfkd.errors import UsageError
from dfkd.evaluation import open_test
from dfkd.evaluation.accuracy import match_classes
from dfkd.evaluation.run_folder import EVALUATION
from dfkd.evaluation.students import examine
from dfkd.files import make_writable, save_settings, sha256
from dfkd.job import Job, Variant, check_students, read_job
from dfkd.rounds import make_images
from dfkd.runtime import own_rank
from dfkd.synthesis import command as synthesis
from dfkd.synthesis.controls import CONTROLS, at_equal_seconds
from dfkd.teachers import Classifier, load_teacher
from dfkd.teachers.sources import WEIGHTS
from dfkd.training.distill import distill, warm_start
from dfkd.training.folder import RESULT
from dfkd.training.teacher import train_teacher

__all__ = ["Job", "Variant", "read_job", "run_job"]

Progress = Callable[[str, float, int], None]  # (stage, done, total)
Say = Callable[[str], None]


def run_job(job: Job, progress: Progress | None = None, say: Say | None = None) -> dict[str, Any]:
    """Do what of a run is not done yet, and say what came of it, in JSON's types.

    progress: called with (stage, done, total). say: gets lines for people.
    Raises UsageError or EngineError as the stages do; Stopped for a signal, with the stage's state saved.
    """
    if own_rank().count > 1:
        why = "several processes share one stage out, and not a run"
        raise UsageError("dfkd-run under torchrun", why, "start it alone, or the commands of its stages by torchrun")
    progress, say = progress or (lambda stage, done, total: None), say or (lambda text: None)
    make_writable(job.out)
    if (training := job.teacher) is not None:
        train_teacher(
            training.data,
            training.training,
            training.out,
            architecture=training.architecture,
            input_size=training.input_size,
            resize=training.resize,
            progress=partial(progress, "teacher"),
            say=say,
            on_new=partial(save_settings, training, training.out, "dfkd-train-teacher"),
        )
    teacher = load_teacher(job.classifier)
    check_students(job, teacher)
    if job.evaluate is not None:  # the students' classes will be the teacher's
        match_classes(open_test(job.evaluate.data, job.evaluate.split, teacher.input_size), teacher.class_names)
    students, refreshes = {}, list[dict[str, Any]]()
    for variant in job.variants:
        words = f"{variant.name}: " if variant.name else ""
        if words:
            say(f"baseline {variant.name}")
        generating = variant.generate
        if variant.control:
            generating = at_equal_seconds(generating, CONTROLS[variant.name], job.variants[0].generate)
        if job.rounds is not None and not variant.name:
            refreshes = make_images(job.rounds, generating, teacher, progress, say)
        else:
            synthesis.run(generating, say, partial(progress, f"{words}images"))
        pool, asked = open_folder(generating.out), variant.distill
        watch, save = partial(progress, f"{words}student"), partial(save_settings, asked, asked.out, "dfkd-distill")
        start = None if asked.init is None else warm_start(asked.init, asked.distill)
        student = distill(pool, teacher, asked.distill, asked.out, student=start, progress=watch, say=say, on_new=save)
        students[variant.name] = student
    tests = _evaluate(job, students, teacher, partial(progress, "test"))
    page, report = _report(job, say)
    for answer in report["answers"]:
        say(f"{answer['question']} {answer['short']}. {answer['text']}")
    own = tests.get("student", {})
    return {
        "out": job.out,
        "report": page,
        "images": job.variants[0].generate.count,
        **({"refreshes": refreshes} if job.rounds is not None else {}),
        "baselines": {name: test["accuracy"] for name, test in tests.get("baselines", {}).items()},
        "differences": report["accuracy"]["differences"],
        "missing_controls": report["accuracy"]["missing_controls"],
        **{name: own.get(name) for name in ("outcomes", "teacher_accuracy", "agreement", "calibration", "accuracy")},
    }


def _evaluate(
    job: Job, students: Mapping[str, Classifier], teacher: Classifier, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """OUT/evaluation.json, measured anew where students or test are others; {} without a test."""
    asked = job.evaluate
    if asked is None:
        return {}
    of: dict[str, Any] = {variant.name: sha256(variant.distill.out / "last" / WEIGHTS) for variant in job.variants}
    of |= {"teacher": teacher.digest(), "data": asked.data, "split": asked.split, "limit": asked.limit}
    return examine(job.out, students, teacher, asked, plain(of), progress)


def _report(job: Job, say: Say) -> tuple[Path, dict[str, Any]]:
    """The page of OUT/report and what report.json holds, written anew where something that it shows is newer."""
    from dfkd.evaluation.page import HTML, JSON, write_report

    page, data = (job.out / "report" / name for name in (HTML, JSON))
    inputs = [job.out / EVALUATION]
    inputs += [path for one in job.variants for path in (one.generate.out / MANIFEST, one.distill.out / RESULT)]
    newest = max(path.stat().st_mtime for path in inputs if path.exists())
    if not data.exists() or data.stat().st_mtime < newest:
        say("writing the report")
        write_report(run=job.out)
    found: dict[str, Any] = json.loads(data.read_text(encoding="utf-8"))
    return page, found
