"""What a benchmark found, as a table and as a picture of curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.quality.scenario import GUIDED
from benchmarks.recording import scaled, table, taken_on
from dfkd.evaluation.paired import over_seeds


def markdown(result: Mapping[str, Any]) -> str:
    """A row a method, the best at the largest budget first: accuracy at each budget, and its distance to guided."""
    budgets, methods = [f"{budget:g}" for budget in result["budgets"]], result["methods"]
    ranked = sorted(methods, key=lambda name: -_rank(methods[name]["accuracy"][budgets[-1]]))
    cells = []
    for name in ranked:
        one = methods[name]
        accuracies = [_cell(one["accuracy"][at], methods[GUIDED]["accuracy"][at], name == GUIDED) for at in budgets]
        images = [found for found in one["images"][budgets[-1]] if found is not None]
        flop = scaled(one["flop"]) if one["flop"] else None
        says = f"**{one['says']}**" if name == GUIDED else one["says"]
        cells.append([says, *accuracies, f"{mean(images):.0f}" if images else None, flop])
    heads = ["student distilled on", *(f"{at} s" for at in budgets), f"images in {budgets[-1]} s", "FLOP an image"]
    teacher, student = result["teacher"], result["student"]
    seeds = len(result["seeds"])
    interval = (
        "; in brackets the distance to guided images with its 95 % interval (Student's t, paired by seed)"
        if seeds > 1
        else ""
    )
    under = (
        f"Accuracy in % on real test images, mean of {seeds} seed{'s' * (seeds > 1)}{interval}. A second is one of two"
        f" cores. Each student is a {student['student']} after {student['steps']} steps; the teacher has"
        f" {100 * mean(teacher):.1f} %. "
    )
    command = f"python -m benchmarks.quality {result['command']}"
    return "\n".join([*table(heads, cells), "", under + taken_on(result["machine"], command)])


def _rank(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return mean(known) if known else 0.0


def _cell(values: Sequence[float | None], guided: Sequence[float], own: bool) -> str | None:
    """Mean, and in brackets the mean of the differences to guided images; None where no group fits the seconds."""
    if any(value is None for value in values):
        return None
    found = f"{100 * _rank(values):.1f}"
    if own or len(values) < 2:
        return f"**{found}**" if own else found
    apart = over_seeds([value or 0.0 for value in values], guided)
    return f"{found} ({100 * apart.value:+.1f} ± {100 * (apart.high - apart.value):.1f})"


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Accuracy against seconds, a curve a method, every seed a point, as a PNG or SVG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, one in result["methods"].items():
        at = [budget for budget in result["budgets"] if None not in one["accuracy"][f"{budget:g}"]]
        of = [[100 * value for value in one["accuracy"][f"{budget:g}"]] for budget in at]
        style = "--" if name in ("real_data", "prior_data") else "-"
        (line,) = axes.plot(
            at, [mean(values) for values in of], style, label=one["says"], lw=2.5 if name == GUIDED else 1.2
        )
        for budget, values in zip(at, of, strict=True):
            axes.plot([budget] * len(values), values, ".", color=line.get_color(), ms=4)
    axes.set_xscale("log")
    axes.set_xticks(result["budgets"], [f"{budget:g}" for budget in result["budgets"]])
    axes.minorticks_off()
    axes.set_xlabel("seconds of synthesis, two cores")
    axes.set_ylabel("student's accuracy on real test images, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
