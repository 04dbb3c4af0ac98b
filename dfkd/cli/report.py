"""dfkd-report: the folders of a run -> one page to read."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dfkd.cli.parse import command, save_settings
from dfkd.config import ReportCommand

COMMAND = "dfkd-report"


def run(asked: ReportCommand) -> dict[str, Any]:
    """Read, measure, write the page; returns its paths and the headline."""
    if asked.compare:
        return _compare(asked)
    from dfkd.evaluation.page import write_report
    from dfkd.evaluation.report import OURS

    several = ("compare", "features", "data")
    report, (page, data, *pictures) = write_report(
        **{name: value for name, value in asked.flat().items() if name not in several}
    )
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


def _compare(asked: ReportCommand) -> dict[str, Any]:
    from dfkd.evaluation.compare_page import write_comparison

    single = ("run", "synthetic", "student", "compare")
    own = {name: value for name, value in asked.flat().items() if name not in single}
    found, (page, data, *pictures) = write_comparison(asked.compare, **own)
    save_settings(asked, page.parent, COMMAND, "report.settings.json")
    return {
        "report": page,
        "json": data,
        "pictures": pictures,
        "reference": found.reference,
        "accuracy": {name: found.students[name].accuracy for name in found.ranking},
        "ranks": [asdict(one) for one in found.ranks],
        "judged": found.judged,
        "notes": list(found.notes),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Exit with the command's status."""
    sys.exit(command(ReportCommand, run, COMMAND, argv))


if __name__ == "__main__":
    main()
