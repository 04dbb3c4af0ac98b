"""The report as files: report.html with every picture inside, report.json, and the pictures as PNG files."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from dfkd.data.contact_sheet import sheet, stack, strips
from dfkd.evaluation import figures
from dfkd.evaluation.figures import DARK, LIGHT, Theme
from dfkd.evaluation.report import OURS, Report, measure
from dfkd.evaluation.run_folder import RunFolder, read_run
from dfkd.files import make_writable, replace_file, replace_text
from dfkd.runtime import resolve_device
from dfkd.teachers import Classifier, load_teacher

Charts = dict[str, Callable[[Theme], Figure]]  # by file name
HTML, JSON = "report.html", "report.json"
BASELINE_COLUMNS = 8
DESCRIPTIONS = {
    "unguided": "the prior alone, without the teacher's gradient",
    "unguided-pixels": "the prior unguided, then the teacher's gradient on the finished pixels",
    "deepinversion": "pixels optimised against the teacher, without a prior",
    "noise": "random pixels",
}


def write_report(
    out: Path | None = None,
    run: Path | None = None,
    synthetic: Path | None = None,
    teacher: Path | None = None,
    student: Path | None = None,
    judged: int = 500,
    device: str = "auto",
) -> tuple[Report, tuple[Path, ...]]:
    """Read a run as `read_run` does, measure it, write the page into `out`; the report and its files, HTML first.

    out: RUN/report where it is not given, or IMAGES-report beside the images where there is no RUN.
    judged: images of each set that the teacher judges, spread over classes and ids; 0: none. device: where it does so.
    Raises UsageError as `read_run`, and where teacher and images disagree about the classes.
    """
    found = read_run(run, synthetic, student, teacher)
    images = found.synthetic.path
    out = out or (run / "report" if run else images.parent / f"{images.resolve().name}-report")
    make_writable(out)
    judge, learned, where = None, None, resolve_device(device)
    if judged and found.guide is not None:
        judge = load_teacher(found.guide, found.synthetic.pool.class_names).freeze(where)
    if found.student is not None and (last := found.student.path / "last").exists():
        learned = Classifier.from_pretrained(last).freeze(where)
    report = measure(found, judge, judged, learned)
    return report, write(report, found, out)


def write(report: Report, run: RunFolder, out: Path) -> tuple[Path, ...]:
    """Write report.html, report.json and PNG files into the folder `out`; returns their paths, these two first."""
    charts, written = drawn(_charts(report), out)
    rows = strips(run.synthetic.pool)
    written.append(save(out / "contact_sheet.png", png(sheet(rows))))
    others = []
    for name in report.ranking:
        if (baseline := run.baselines[name]).images is not None:
            few = strips(baseline.images, BASELINE_COLUMNS)
            written.append(save(out / f"contact_sheet_{name}.png", png(sheet(few))))
            others.append({"name": name, "picture": uri(png(stack(few)))})
    mistakes = list(zip(report.errors.mistakes, run.mistakes, strict=True)) if report.errors and run.mistakes else []
    page = environment().get_template("report.html.j2")
    html = page.render(
        report=report,
        version=report.version,
        charts=charts,
        rows=[
            {"class_name": row.class_name, "picture": uri(png(row.picture)), "width": row.picture.width * row.scale}
            for row in rows
        ],
        shown=max(row.shown for row in rows),
        others=others,
        mistakes=[{"picture": uri(png(picture)), "what": mistake} for mistake, picture in mistakes],
        ours=OURS,
        descriptions=DESCRIPTIONS,
        losses=figures.LOSSES,
        counted=figures.COUNTED,
        named=figures.NAMED,
    )
    replace_text(out / HTML, html)
    replace_text(out / JSON, json.dumps(asdict(report), indent=1, allow_nan=False) + "\n")
    return out / HTML, out / JSON, *written


def drawn(charts: Charts, out: Path) -> tuple[dict[str, dict[str, str]], list[Path]]:
    """Pictures of charts for the page, by name and "light" or "dark", and their PNG files in the folder `out`."""
    found, written = {}, []
    for name, draw in charts.items():
        light, dark = (figures.png(draw(theme)) for theme in (LIGHT, DARK))
        written.append(save(out / f"{name}.png", light))
        found[name] = {"light": uri(light), "dark": uri(dark)}
    return found, written


def _charts(report: Report) -> Charts:
    """The charts that this report has the data for, by file name."""
    images, student, views = report.images, report.student, report.teacher_views
    charts: Charts = {
        "class_balance": lambda theme: figures.class_balance(
            images.class_counts, images.sure_counts, images.class_names, theme
        )
    }
    if images.losses:
        charts["loss_curves"] = lambda theme: figures.loss_curves(images.losses, theme)
    if (sure := images.confidence) is not None:
        charts["confidence"] = lambda theme: figures.confidence_histogram(sure, theme)
    gaps = {words(name): view.layer_gaps for name, view in views.items() if view.layer_gaps}
    if gaps:
        charts["bn_gap"] = lambda theme: figures.layer_gaps(gaps, theme)
    if student is not None and (matrix := student.confusion) is not None:
        charts["confusion"] = lambda theme: figures.confusion(matrix, images.class_names, theme)
    if (wrong := report.errors) is not None and wrong.reliability:
        bins = {"student": wrong.reliability, "teacher": wrong.teacher_reliability}
        charts["reliability"] = lambda theme: figures.reliability(bins, theme)
    if wrong is not None and wrong.classes:
        charts["class_accuracy"] = lambda theme: figures.class_accuracy(wrong.classes, theme)
    if student is not None and (log := student.log):
        charts["training"] = lambda theme: figures.training_curve(log, theme)
    return charts


def words(name: str) -> str:
    return name.replace("_", " ")


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def number(value: float | None, digits: int = 2) -> str:
    """Thousands set apart by thin spaces, as the page does throughout."""
    return "–" if value is None else f"{value:,.{digits}f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def signed(points: float) -> str:
    """Percentage points with their sign."""
    return f"{'+' if points >= 0 else '−'}{abs(points):.1f}"


def duration(seconds: float | None) -> str:
    """3.4 s, 42 s, 2 min 05 s, 1 h 02 min."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def environment() -> Environment:
    """The templates of this folder, with the page's ways to write numbers as filters."""
    found = Environment(
        loader=PackageLoader("dfkd", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "words": words,
        "percent": percent,
        "number": number,
        "duration": duration,
        "signed": signed,
    }
    return found


def uri(data: bytes) -> str:
    """A PNG file as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png(picture: Image.Image) -> bytes:
    """A picture as a PNG file."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def save(path: Path, data: bytes) -> Path:
    """Write a file that is whole or absent; its path."""
    replace_file(path, lambda file: file.write(data))
    return path
