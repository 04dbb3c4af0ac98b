"""dfkd-report: the folders of a run -> one page to read."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfkd.cli.options import command, option
from dfkd.cli.teacher import load_teacher
from dfkd.runtime import resolve_device
from dfkd.evaluation.report import OURS, measure
from dfkd.evaluation.run_folder import RunFolder, read_run
from dfkd.files import make_writable
from dfkd.teachers.classifier import Classifier

COMMAND = "dfkd-report"
FOLDER = "report"


@dataclass(frozen=True)
class Options:
    """Show what a run made: one page that needs nothing beside it, its numbers, and its pictures.

    Reads RUN/synthetic (dfkd-generate) and, as far as they are there, RUN/teacher (dfkd-train-teacher), RUN/student
    (dfkd-distill), RUN/baselines/NAME/{synthetic,student} and RUN/summary.json; the page says what is missing. Reads
    only what those commands wrote, never a real image. Writes OUT/report.html, OUT/report.json and PNG files.
    """

    run: Path | None = option(None, "folder of a run, as make demo writes it")
    synthetic: Path | None = option(None, "folder of dfkd-generate, instead of RUN/synthetic")
    teacher: Path | None = option(
        None, "folder of dfkd-train-teacher, or the file given to dfkd-generate, instead of RUN/teacher"
    )
    student: Path | None = option(None, "folder of dfkd-distill, instead of RUN/student")
    out: Path | None = option(
        None, f"folder to write; RUN/{FOLDER}, or {FOLDER} beside the images where there is no RUN"
    )
    judged: int = option(
        500, "images of each set that the teacher judges, spread over the ids; 0: none", unit="images", low=0
    )
    device: str = option("auto", "where the teacher judges: auto, cpu, cuda or cuda:N")


def run(options: Options) -> dict[str, Any]:
    """Read, measure, write the page; returns its paths and the headline."""
    # Imported here and not above: matplotlib takes a second to load, which --help and a wrong option need not wait for.
    from dfkd.evaluation.page import write

    device = resolve_device(options.device)
    found = read_run(options.run, options.synthetic, options.student, options.teacher)
    out = options.out or (options.run or found.synthetic.path.parent) / FOLDER
    make_writable(out)
    teacher = _teacher(found, device) if options.judged else None
    report = measure(found, teacher, options.judged)
    page, data, *pictures = write(report, found, out)
    view = report.teacher_views.get(OURS)
    return {
        "report": page,
        "json": data,
        "pictures": pictures,
        "student_accuracy": report.accuracy.student,
        "teacher_accuracy": report.accuracy.teacher,
        "best_baseline": report.accuracy.best_baseline,
        "margin": report.accuracy.margin,
        "images": report.images.count,
        "teacher_agreement": view.agreement if view else None,
        "bn_gap": view.gap if view else None,
        "missing": [missing.part for missing in report.missing],
    }


def main(argv: Sequence[str] | None = None) -> None:
    sys.exit(command(Options, run, COMMAND, argv))


def _teacher(found: RunFolder, device: torch.device) -> Classifier | None:
    """The run's teacher, None where the run has none; a bare file is read as dfkd-generate read it."""
    if found.teacher is None:
        return None
    given: dict[str, Any] = found.synthetic.settings.get("options", {}) if found.teacher.path.is_file() else {}
    names = found.synthetic.pool.class_names
    teacher = load_teacher(given.get("teacher"), found.teacher.path, given.get("normalisation"), names)
    teacher.module.eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return teacher
