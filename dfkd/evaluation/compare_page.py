"""Runs side by side as files: report.html with every picture inside, report.json, and the pictures as PNG files."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dfkd.config import TeacherConfig, plain
from dfkd.data import Images
from dfkd.data.contact_sheet import Strip, sheet, stack, strips
from dfkd.errors import UsageError
from dfkd.evaluation import figures
from dfkd.evaluation.compare import Comparison, compare
from dfkd.evaluation.entries import CEILING, Entries, Point, own_name, read_entries
from dfkd.evaluation.fidelity import check_features
from dfkd.evaluation.image_measures import Measure, Seen, check_real, mean, measures
from dfkd.evaluation.page import (
    DESCRIPTIONS,
    HTML,
    JSON,
    Charts,
    drawn,
    environment,
    number,
    percent,
    png,
    save,
    uri,
    words,
)
from dfkd.evaluation.real_data import learned_from, open_test
from dfkd.evaluation.report import check_classes
from dfkd.files import make_writable, replace_text
from dfkd.runtime import resolve_device
from dfkd.teachers import Classifier, load_teacher

COLUMNS = 8  # images of a class on a method's contact sheet
TEACHER = "the teacher"  # as a network whose features are taken
REAL = "other real images"
SECONDS = "accuracy_seconds"
# Charts of accuracy by file name, what is along the axis, and how it is read of a student.
_AXES: tuple[tuple[str, str, Callable[[Point], float]], ...] = (
    (SECONDS, "seconds of synthesis", lambda point: point.budget or point.seconds),
    ("accuracy_images", "images", lambda point: point.images),
)
WORDS = DESCRIPTIONS | {
    "guided": "the prior, steered by the teacher's gradient",
    "unguided_pixels": DESCRIPTIONS["unguided-pixels"],
    "noise_pixels": "random pixels, then the teacher's gradient on them",
    "guided_without_pixels": "guided diffusion alone, its pixels as the decoder has them",
    "prior_data": "the images that the prior was trained on",
    "fast": "a generator that learns with the images (Fast)",
    "real_data": "real images of the teacher's world: the ceiling",
}


def write_comparison(
    runs: Sequence[str],
    out: Path | None = None,
    teacher: Path | None = None,
    features: str | None = None,
    data: str | None = None,
    judged: int = 500,
    device: str = "auto",
) -> tuple[Comparison, tuple[Path, ...]]:
    """Read runs as `read_entries` does, measure them, write the page into `out`; what was measured, and the files.

    out: FIRST-compare beside the first run where it is not given. teacher: that judges all images, instead of the one
    that each was made with. features: a network whose features are compared, as `Classifier.from_pretrained` takes it,
    beside the teacher's own. data: real images, instead of those that the students were tested on. judged: images of
    each set. Raises UsageError as `read_entries` and `compare`.
    """
    entries = read_entries(runs)
    given = [name for name, value in (("teacher", teacher), ("features", features), ("data", data)) if value]
    if given and not entries.each(judged):
        why = "no image is judged" if entries.sets else "records alone have no images"
        raise UsageError(f"--{given[0]} does not act", why, "give NAME=FOLDER of images too, or leave it out")
    out = out or entries.first.parent / f"{entries.first.resolve().stem}-compare"
    where, count = resolve_device(device), entries.each(judged)
    judges = _teachers(entries, teacher) if count else [None] * len(entries.sets)
    networks = {} if features is None else {features: Classifier.from_pretrained(features)}
    for network in networks.values():
        check_features(network)
    if judges and judges[0] is not None and judges[0].last_linear() is not None:
        networks[TEACHER] = judges[0]
    for network in (*judges, *networks.values()):
        if network is not None:
            network.freeze(where)
    name, split = (data, "test") if data else entries.test[:2] if entries.test else ("", "")
    real, notes = None, []
    try:
        if count and not networks:
            raise UsageError("No network has features", "no teacher with a linear layer is known", "give --features")
        real = _real(name, split, entries, judges, count) if count else None
    except UsageError as error:
        if data or features:
            raise
        notes.append(f"Not compared with real images. {error}")
    make_writable(out)
    found = compare(entries, judges, networks if real else {}, real, name if real else None, count, notes)
    return found, write(found, entries, out)


def _real(name: str, split: str, entries: Entries, judges: Sequence[Classifier | None], count: int) -> Images:
    """Real images that `count` of each set are compared with. Raises UsageError: none are known, or as `check_real`."""
    if not name:
        raise UsageError("No test of these runs names any", todo="give --data")
    learned = learned_from(*(source for judge in judges if judge is not None for source in judge.sources))
    real = open_test(name, split, entries.sets[0].pool.image_size, learned)
    check_real(real, entries.class_names, count)
    return real


def _teachers(entries: Entries, given: Path | None) -> list[Classifier | None]:
    """The teacher of every set, each loaded once."""
    loaded: dict[TeacherConfig, Classifier] = {}
    found: list[Classifier | None] = []
    for one in entries.sets:
        guide = TeacherConfig(checkpoint=given) if given is not None else one.guide
        if guide is not None and guide not in loaded:
            loaded[guide] = load_teacher(guide, one.pool.class_names)
            check_classes(one.pool.class_names, loaded[guide])
        found.append(None if guide is None else loaded[guide])
    return found


def write(found: Comparison, entries: Entries, out: Path) -> tuple[Path, ...]:
    """Write report.html, report.json and PNG files into the folder `out`; returns their paths, these two first."""
    charts, written = drawn(_charts(found), out)
    sheets = []
    for name, strip in _sheets(entries).items():
        written.append(save(out / f"contact_sheet_{name.replace(' / ', '_').replace('/', '_')}.png", png(sheet(strip))))
        classes = [row.class_name for row in strip]
        sheets.append({"name": name, "picture": uri(png(stack(strip))), "classes": classes, "shown": strip[0].shown})
    page = environment().get_template("compare.html.j2")
    html = page.render(
        found=found,
        version=found.version,
        charts=charts,
        sheets=sorted(sheets, key=lambda one: found.ranking.index(str(one["name"]))),
        tables=_tables(found),
        descriptions={name: text for name in found.students if (text := WORDS.get(own_name(name)))},
        teacher=TEACHER,
        real=REAL,
    )
    replace_text(out / HTML, html)
    replace_text(out / JSON, json.dumps(plain(asdict(found)), indent=1, allow_nan=False) + "\n")
    return out / HTML, out / JSON, *written


def _charts(found: Comparison) -> Charts:
    """The charts that there is data for, by file name."""
    charts: Charts = {}
    for name, along, read in _AXES:
        curves = {}
        for method in found.ranking:
            points = [(point.budget, read(point), point.accuracy) for point in found.students[method].points]
            budgets = dict.fromkeys(budget for budget, x, _ in points if x)
            if budgets:
                curves[words(method)] = [[(x, y) for own, x, y in points if own == budget and x] for budget in budgets]
        named = [budget for budget in found.budgets if budget is not None] if name == SECONDS else []
        if curves:
            grey = [words(method) for method in found.ranking if own_name(method) == CEILING]
            charts[name] = partial(figures.accuracy_curves, curves, words(found.reference), grey, along, named)
    gaps = {words(name): one.behind[-1][1] for name in found.ranking if (one := found.students[name]).behind}
    if any(gap.known for gap in gaps.values()):
        charts["behind"] = partial(figures.gaps, gaps, words(found.reference))
    return charts


def _sheets(entries: Entries) -> dict[str, list[Strip]]:
    """Strips of every method's first seed: the same classes, and as many images of each."""
    pools = {name: method.sets[0].pool for name, method in entries.methods.items() if method.sets}
    if not pools:
        return {}
    counts = torch.stack([pool.labels.bincount(minlength=len(pool.class_names)) for pool in pools.values()]).amin(0)
    labels = counts.nonzero()[:, 0]
    if not len(labels):
        return {}
    columns = min(COLUMNS, int(counts[labels].min()))
    return {name: strips(pool, columns, labels) for name, pool in pools.items()}


def _tables(found: Comparison) -> list[dict[str, Any]]:
    """Tables of what was measured of images, as text: what their teacher sees, then one for each network's features.

    rows: (method, [(text, whether it is the best)]). ranks: the measures' rank correlations, [] of few methods.
    """
    tables = []
    for network in (None, *found.networks):
        columns = [one for one in measures(list(found.networks)) if one.features == network]
        values = {
            name: [mean([one.read(seen) for seen in sets]) for one in columns] for name, sets in found.images.items()
        }
        ranks = {one.measure: one for one in found.ranks if one.features == network}
        names = [one.name for one in columns]
        best = [one and one.best for one in map(ranks.get, names)]
        if network is not None and network in found.real:
            real = Seen(0, 0, 0, None, None, {network: found.real[network]})
            values[REAL] = [one.read(real) for one in columns]
        rows = [name for name in (*found.ranking, REAL) if any(value is not None for value in values.get(name, ()))]
        texts = [_texts(one, [values[name][place] for name in rows]) for place, one in enumerate(columns)]
        if rows:
            tables.append(
                {
                    "network": network,
                    "columns": names,
                    "rows": [
                        (name, [(text[place], name == first) for text, first in zip(texts, best, strict=True)])
                        for place, name in enumerate(rows)
                    ],
                    "ranks": [one and one.correlation for one in map(ranks.get, names)] if ranks else [],
                }
            )
    return tables


def _texts(measure: Measure, values: Sequence[float | None]) -> list[str]:
    """A column: three digits of its largest number, and one after the point at least."""
    if measure.share:
        return [percent(value) for value in values]
    largest = max([abs(value) for value in values if value], default=1.0)
    return [number(value, min(max(2 - math.floor(math.log10(largest)), 1), 4)) for value in values]
