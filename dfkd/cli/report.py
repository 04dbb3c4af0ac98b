"""dfkd-report: the folders of a run -> one page to read."""

import sys
from collections.abc import Sequence
from typing import Any

from dfkd.cli.parse import command, save_settings
from dfkd.config import ReportCommand

COMMAND = "dfkd-report"


def run(asked: ReportCommand) -> dict[str, Any]:
    """Read, measure, write the page; returns its paths and the headline."""
    from dfkd.evaluation.page import write_report
    from dfkd.evaluation.report import OURS

    report, (page, data, *pictures) = write_report(**asked.flat())
    save_settings(asked, page.parent, COMMAND, "report.settings.json")
    view = report.teacher_views.get(OURS)
    return {
        "report": page,
        "json": data,
        "pictures": pictures,
        "student_accuracy": report.accuracy.student,
        "teacher_accuracy": report.accuracy.teacher,
        "answers": {answer.question: answer.short for answer in report.answers},
        "missing_controls": report.accuracy.missing_controls,
        "images": report.images.count,
        "teacher_agreement": view.agreement if view else None,
        "bn_gap": view.gap if view else None,
        "missing": list(report.missing),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Exit with the command's status."""
    sys.exit(command(ReportCommand, run, COMMAND, argv))


if __name__ == "__main__":
    main()
