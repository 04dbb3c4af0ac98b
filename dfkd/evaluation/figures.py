"""The report's charts: data in, matplotlib Figure out, in a light or a dark theme; no global state of pyplot.

A figure is about as wide as a column of the report, so that its text keeps the size of the text around it.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from dfkd.evaluation.answers import Bin
from dfkd.evaluation.metrics import BINS, Band, Confidence
from dfkd.evaluation.paired import Difference
from dfkd.evaluation.tested import ClassAccuracy

WIDTH = 5.6  # inches
DPI = 200
TEXT, SMALL = 11.5, 10.0  # points
NAMED = 30  # classes up to which each is named on an axis
LABEL = 0.2  # inches that a curve's name takes
COUNTED = 15  # classes up to which a confusion matrix shows its counts
LOSSES = {
    "cls": "cross-entropy",
    "bn": "BatchNorm statistics",
    "adv": "adversarial",
}


@dataclass(frozen=True)
class Theme:
    """Colours; `series` are those of the lines after the accent, `ramp` runs from none to all."""

    surface: str
    text: str
    muted: str
    grid: str
    accent: str
    second: str
    series: tuple[str, ...]
    ramp: tuple[str, ...]


LIGHT = Theme(
    surface="#ffffff",
    text="#1c2430",
    muted="#5b6675",
    grid="#e4e8ee",
    accent="#1f5fd6",
    second="#b9c9e8",
    series=("#d9730d", "#2c8a57", "#a445b2", "#8a6d1f", "#c23a4b", "#4f8fa8"),
    ramp=("#f4f7fc", "#9dbbee", "#1f5fd6", "#0d2f73"),
)
DARK = Theme(
    surface="#181c23",
    text="#e6eaf0",
    muted="#9aa5b4",
    grid="#2c333e",
    accent="#6ea3ff",
    second="#3a4a68",
    series=("#f0a050", "#5fc48b", "#d58ae0", "#d3b65a", "#f07a86", "#7fc0d8"),
    ramp=("#1d232d", "#2c4a80", "#4f86e8", "#b9d2ff"),
)


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes that are the same for the same data."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def loss_curves(bands: Mapping[str, Band], theme: Theme) -> Figure:
    """One panel per guidance loss: the mean over the images and the band of 10 to 90 % of them."""
    figure, panels = _panels(len(bands), theme, "guided step")
    for axes, (name, band) in zip(panels, bands.items(), strict=True):
        steps = range(1, len(band.mean) + 1)
        axes.fill_between(steps, band.low, band.high, color=theme.accent, alpha=0.22, linewidth=0)
        axes.plot(steps, band.mean, color=theme.accent, linewidth=1.8)
        _title(axes, LOSSES.get(name, name), theme)
        if min(band.low) > 0 and max(band.high) > 20 * min(band.low):
            _log(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def confidence_histogram(confidence: Confidence, theme: Theme) -> Figure:
    """How many images have which teacher probability of their label."""
    figure, axes = _single(2.9, theme)
    edges = np.arange(BINS) / BINS
    axes.bar(edges, confidence.histogram, width=0.9 / BINS, align="edge", color=theme.accent)
    crowded = max(confidence.histogram) > 0.6 * sum(confidence.histogram)
    if crowded:  # one bin holds nearly all: the others are the interesting ones
        _log(axes)
        axes.set_ylim(bottom=0.7)
    axes.set_xlim(0, 1)
    axes.set_xlabel("teacher probability of the label", color=theme.text, fontsize=TEXT)
    axes.set_ylabel("images (log scale)" if crowded else "images", color=theme.text, fontsize=TEXT)
    return figure


def class_balance(counts: Sequence[int], sure: Sequence[int] | None, names: Sequence[str], theme: Theme) -> Figure:
    """Images per class; in full colour those of which the teacher is sure, where that is known."""
    named = len(names) <= NAMED
    figure, axes = _single(0.27 * len(names) + 0.9 if named else 4.0, theme)
    places = np.arange(len(names))
    axes.barh(places, counts, height=0.72, color=theme.accent if sure is None else theme.second)
    if sure is not None:
        axes.barh(places, sure, height=0.72, color=theme.accent)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlabel("images", color=theme.text, fontsize=TEXT)
    if named:
        axes.set_yticks(places, [_short(name) for name in names])
    else:
        axes.set_ylabel("class number", color=theme.text, fontsize=TEXT)
    return figure


def layer_gaps(gaps: Mapping[str, Sequence[float]], theme: Theme) -> Figure:
    """BN gap by layer, a line per set of images; the first set is drawn in the accent."""
    figure, axes = _single(3.4, theme)
    colours = (theme.accent, *theme.series)
    for i, (name, values) in enumerate(gaps.items()):
        style = "-" if i < len(colours) else "--"
        colour, width = colours[i % len(colours)], 1.5 if i else 2.4
        axes.plot(range(1, len(values) + 1), values, style, color=colour, linewidth=width, label=name, zorder=9 - i)
    every = [value for values in gaps.values() for value in values if value > 0]
    if every and max(every) > 10 * min(every):
        _log(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("BatchNorm layer, from the image to the logits", color=theme.text, fontsize=TEXT)
    axes.set_ylabel("BN gap", color=theme.text, fontsize=TEXT)
    figure.legend(loc="outside upper left", ncols=3, fontsize=SMALL, frameon=False, labelcolor=theme.text)
    return figure


def confusion(matrix: Sequence[Sequence[int]], names: Sequence[str], theme: Theme) -> Figure:
    """Rows: the true class; colour: share of the row; counts are written where there is room for them."""
    counts = np.array(matrix, np.float64)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = _single(WIDTH * 0.92, theme)
    ramp = LinearSegmentedColormap.from_list("ramp", theme.ramp)
    # A square root's scale: mistakes of a few per cent are what one looks for beside a diagonal of ninety.
    axes.imshow(share, cmap=ramp, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axes.grid(False)
    every = max(1, math.ceil(len(names) / NAMED))
    places = list(range(0, len(names), every))
    labels = [_short(names[i], 14) for i in places]
    upright = max(map(len, labels)) * len(labels) > 60
    axes.set_xticks(places, labels, rotation=90 if upright else 0)
    axes.set_yticks(places, labels)
    axes.tick_params(labelsize=SMALL if len(names) <= COUNTED else 6.5)
    axes.set_xlabel("the student's answer", color=theme.text, fontsize=TEXT)
    axes.set_ylabel("true class", color=theme.text, fontsize=TEXT)
    if len(names) <= COUNTED:
        size = 10 if len(names) <= 10 else 7.5
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = theme.surface if share[row, column] > 0.2 else theme.text
                axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=colour, fontsize=size)
    return figure


def reliability(bins: Mapping[str, Sequence[Bin]], theme: Theme) -> Figure:
    """Share of right answers by how sure the network was; the area of a dot is its share of the images."""
    figure, axes = _single(3.6, theme)
    axes.plot((0, 1), (0, 1), "--", color=theme.muted, linewidth=1.2)
    for (name, found), colour in zip(bins.items(), (theme.accent, theme.series[0]), strict=False):
        if found:
            x, y = [one.probability for one in found], [one.accuracy for one in found]
            most = max(one.images for one in found)
            areas = [max(140 * one.images / most, 6) for one in found]
            axes.plot(x, y, color=colour, linewidth=1.4, label=name)
            axes.scatter(x, y, areas, color=colour, zorder=3)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.04)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("probability of its answer", color=theme.text, fontsize=TEXT)
    axes.set_ylabel("right", color=theme.text, fontsize=TEXT)
    axes.legend(loc="upper left", fontsize=SMALL, frameon=False, labelcolor=theme.text)
    return figure


def class_accuracy(classes: Sequence[ClassAccuracy], theme: Theme) -> Figure:
    """Accuracy by class with its interval, the student's worst at the top, NAMED at most; the teacher's beside it."""
    worst = sorted(classes, key=lambda one: one.student)[:NAMED]
    figure, axes = _single(0.32 * len(worst) + 1.3, theme)
    places = np.arange(len(worst))
    for name, shift, colour in (("student", -0.14, theme.accent), ("teacher", 0.14, theme.series[0])):
        own = name == "student"
        drawn = [
            (place + shift, one.student if own else one.teacher, one.interval if own else one.teacher_interval)
            for place, one in enumerate(worst)
        ]
        known = [(place, value, ends) for place, value, ends in drawn if value is not None and ends is not None]
        if known:
            y, x, ends = zip(*known, strict=True)
            axes.hlines(y, [low for low, _ in ends], [high for _, high in ends], color=colour, linewidth=2, alpha=0.55)
            axes.plot(x, y, "o", color=colour, markersize=5.5, label=name)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_yticks(places, [_short(one.name) for one in worst])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("right, with the 95 % interval", color=theme.text, fontsize=TEXT)
    figure.legend(loc="outside upper left", ncols=2, fontsize=SMALL, frameon=False, labelcolor=theme.text)
    return figure


def training_curve(log: Sequence[Mapping[str, float]], theme: Theme) -> Figure:
    """Loss, and agreement with the teacher on held-out synthetic images, over a student's steps."""
    shown = [key for key in ("loss", "agreement") if any(key in line for line in log)]
    figure, panels = _panels(len(shown), theme, "step")
    for axes, key in zip(panels, shown, strict=True):
        steps, values = zip(*((line["step"], line[key]) for line in log if key in line), strict=True)
        axes.plot(steps, values, color=theme.accent, linewidth=1.8, marker="o" if len(steps) < 3 else None)
        if key == "agreement":
            _title(axes, "agreement with the teacher, held-out synthetic images", theme)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        else:
            _title(axes, "distillation loss", theme)
            if min(values) > 0 and max(values) > 20 * min(values):
                _log(axes)
    return figure


def accuracy_curves(
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    first: str,
    ceilings: Sequence[str],
    along: str,
    named: Sequence[float],
    theme: Theme,
) -> Figure:
    """A curve a method through the means of its groups of points (x > 0, accuracy), one a budget; each point is drawn.

    first: the method in the accent's colour. ceilings: those that are drawn dashed and grey. along: name of the x axis.
    named: places on it that are named, () for round ones.
    """
    figure, axes = _single(height := max(4.2, LABEL * len(curves) + 1), theme)
    ends: list[tuple[float, str, str]] = []
    others = [name for name in curves if name not in (first, *ceilings)]
    for name, groups in curves.items():
        colour, width, style = theme.accent, 2.6, "-"
        if name in ceilings:
            colour, width, style = theme.muted, 1.4, "--"
        elif name != first:
            turn, place = divmod(others.index(name), len(theme.series))
            colour, width, style = theme.series[place], 1.4, ("-", "--", ":")[turn % 3]
        x, y = np.array([np.mean(group, axis=0) for group in groups]).T
        axes.plot(x, y, linestyle=style, color=colour, linewidth=width, marker="o", markersize=4.5, zorder=4)
        points = np.array([point for group in groups for point in group])
        axes.scatter(points[:, 0], points[:, 1], s=9, color=colour, alpha=0.45, linewidths=0, zorder=3)
        ends.append((float(y[-1]), name, colour))
    every = [x for groups in curves.values() for group in groups for x, _ in group]
    if max(every) > 4 * min(every):
        _log(axes, "x")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if named:
        axes.set_xticks(named, [f"{x:g}" for x in named])
    axes.margins(x=0.06)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(along, color=theme.text, fontsize=TEXT)
    axes.set_ylabel("accuracy of the student", color=theme.text, fontsize=TEXT)
    _label_ends(axes, ends, height)
    return figure


def gaps(found: Mapping[str, Difference], first: str, theme: Theme) -> Figure:
    """How far each method is ahead of the first, in points, with its 95 % interval where one is known."""
    figure, axes = _single(0.34 * len(found) + 0.9, theme)
    axes.axvline(0, color=theme.accent, linewidth=1.6)
    for place, one in enumerate(found.values()):
        if one.known:
            axes.hlines(place, 100 * one.low, 100 * one.high, color=theme.text, linewidth=2, alpha=0.5)
        axes.plot(100 * one.value, place, "o", color=theme.text, markersize=6)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_yticks(range(len(found)), [_short(name, 28) for name in found])
    axes.set_xlabel(f"points ahead of {_short(first, 28)}", color=theme.text, fontsize=TEXT)
    return figure


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], height: float) -> None:
    """The names of curves at the right edge, as high as the curves end or as near to it as others leave room.

    ends: last value, name and colour of each. height: of the figure, in inches.
    """
    low, high = axes.get_ylim()
    step = (high - low) * LABEL / (height - 0.8)  # which the axis below the curves takes
    order, places = sorted(ends), [low - step / 2]
    for value, _, _ in order:
        places.append(max(value, places[-1] + step))
    above = high + step / 2
    for turn in range(len(order), 0, -1):  # what was pushed over the top comes down again
        above = places[turn] = min(places[turn], above - step)
    across = axes.get_yaxis_transform()
    for (_, name, colour), place in zip(order, places[1:], strict=True):
        axes.text(1.02, place, _short(name, 24), color=colour, fontsize=SMALL, va="center", transform=across)
    axes.set_ylim(low, high)


def _single(height: float, theme: Theme) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=theme.surface)
    return figure, _dress(figure.subplots(), theme)


def _panels(count: int, theme: Theme, below: str) -> tuple[Figure, list[Axes]]:
    """Panels one above the other with one horizontal axis, named under the last."""
    figure = Figure(figsize=(WIDTH, 1.75 * count + 0.7), layout="constrained", facecolor=theme.surface)
    column = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    panels = [_dress(axes, theme) for axes in column]
    panels[-1].set_xlabel(below, color=theme.text, fontsize=TEXT)
    return figure, panels


def _dress(axes: Axes, theme: Theme) -> Axes:
    axes.set_facecolor(theme.surface)
    axes.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=theme.muted, labelsize=SMALL, length=0, labelcolor=theme.text)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _log(axes: Axes, along: Literal["x", "y"] = "y") -> None:
    """A logarithmic axis with plain numbers, at 1, 2 and 5 of each decade where there are few decades."""
    axes.set(**{f"{along}scale": "log"})
    axis = axes.xaxis if along == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    few = high < 300 * low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=8 if few else 6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _title(axes: Axes, text: str, theme: Theme) -> None:
    axes.set_title(text, loc="left", color=theme.text, fontsize=TEXT)


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
