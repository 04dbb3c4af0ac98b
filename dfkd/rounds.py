"""Synthesis and distillation in turn, in one run: images, a student that learns from all of them so far, and so on.

    phase k     images made against the student of refresh k - 1, from [rounds] adv-from on     OUT/synthetic
    refresh k   that student goes on, on the images of all phases until now                     OUT/rounds/00k/student

as DiffDFKD alternates them (arXiv 2504.00870; its round is an image of every class). All images lie in one folder: a
phase ends a shard, and a shard has on record which student it was made against. The synthesizer is loaded once and
takes each new student. A run that was stopped goes on: its images as in dfkd.synthesis.run, a refresh as in
dfkd.training.distill.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dfkd.config import DistillCommand, GenerateCommand
from dfkd.data import open_folder
from dfkd.files import save_settings
from dfkd.job import Rounds
from dfkd.synthesis import command as synthesis
from dfkd.synthesis.run import Run, Written
from dfkd.teachers import Classifier
from dfkd.training.distill import distill, untrained_student, warm_start
from dfkd.training.folder import read_result

Progress = Callable[[str, float, int], None]  # (stage, done, total)
Say = Callable[[str], None]

KEPT = ("agreement", "steps", "ended_by", "seconds")  # of a refresh's result


def make_images(
    rounds: Rounds, asked: GenerateCommand, teacher: Classifier, progress: Progress, say: Say
) -> list[dict[str, Any]]:
    """Make the images of a run, and a refreshed student after every phase but the last.

    Returns what came of each refresh: {"images": learned from, "agreement": with the teacher on those held out, ...}.
    Raises UsageError, EngineError and Stopped as the two stages do.
    """
    phases, refreshes = rounds.ids(asked.count), list[dict[str, Any]]()
    takes = rounds.config.adv_from is not None

    def write(work: Run) -> Written:
        written, student = Written(), None
        for phase, ids in enumerate(phases):
            against = student if rounds.against(phase) else None
            if takes:
                work.update(against, ids.start)
            adversary = f", against the student of refresh {phase}" if against else ""
            say(f"phase {phase + 1} of {len(phases)}: images {ids.start} to {ids.stop - 1}{adversary}")
            written += work.write(partial(progress, "images"), asked.logging, ids)
            if phase + 1 < len(phases):
                learning = rounds.refreshed(phase)
                student = refresh(learning, asked.out, ids.stop, teacher, progress, say)
                result = read_result(learning.out) or {}
                refreshes.append({"images": ids.stop, **{name: result.get(name) for name in KEPT}})
                say(f"refresh {phase + 1}: agreement with the teacher {result.get('agreement')}")
        return written

    untrained = first_student(rounds.refresh, teacher) if takes else None
    follows = {"rounds": rounds.config.identity()} if takes else {}
    synthesis.run(asked, say, turns=synthesis.InTurn(untrained, follows, len(phases[0]), write))
    return refreshes


def refresh(
    asked: DistillCommand, images: Path, until: int, teacher: Classifier, progress: Progress, say: Say
) -> Classifier:
    """The student of a refresh, on the images of ids below `until` of a folder that is still being filled."""
    watch = partial(progress, f"refresh {asked.out.parent.name}")
    save = partial(save_settings, asked, asked.out, "dfkd-distill")
    pool = open_folder(images, until=until)
    start = None if asked.init is None else warm_start(asked.init, asked.distill)
    return distill(pool, teacher, asked.distill, asked.out, student=start, progress=watch, say=say, on_new=save)


def first_student(asked: DistillCommand, teacher: Classifier) -> Classifier:
    """The student before the first refresh: that of `init`, or one of fresh weights."""
    start = None if asked.init is None else warm_start(asked.init, asked.distill)
    return untrained_student(start, teacher, asked.distill, teacher.class_names)
