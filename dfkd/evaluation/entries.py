"""What `dfkd-report --compare` is given, read into methods: students with what their images cost, and the images.

A RUN is a folder as `read_run` takes it, of which its baselines are methods too, named RUN / BASELINE, or a benchmark's
record, a JSON file {"budgets": [seconds], "methods": {name: {"accuracy", "images", "seconds"}}}, each {budget: [one a
seed]}. NAME=RUN names it. Folders of one NAME are seeds of one method, by the seeds of their images; a folder with the
name of a record's method supplies images of it, whose accuracy the record has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dfkd.config import TeacherConfig
from dfkd.data import MANIFEST, ShardPool, some_names
from dfkd.errors import UsageError
from dfkd.evaluation.real_data import same_data
from dfkd.evaluation.run_folder import RunFolder, read_run
from dfkd.evaluation.tested import STRONG, accuracy, strong_kind
from dfkd.files import read_object

REFERENCE = "guided"  # the first method of this name is compared with, else the first of all
CEILING = "real_data"  # a method whose students learned from real images
_OF_SEEDS = {...: [float]}
_RECORD: dict[str, Any] = {
    "budgets": [float],
    "methods": {...: {"accuracy": _OF_SEEDS, "images": _OF_SEEDS, "seconds": _OF_SEEDS}},
}


@dataclass(frozen=True)
class Point:
    """One student: accuracy on real images in 0..1, and what its images were. seconds: that they took, 0 if unknown.
    budget: seconds that they were allowed, None where there was no such bound.
    """

    seed: int
    accuracy: float
    seconds: float
    images: int
    budget: float | None = None


@dataclass(frozen=True)
class ImageSet:
    """Images of one seed. accuracy: of their student, None if it was not tested. guide: the teacher that they were
    made with."""

    seed: int
    pool: ShardPool
    accuracy: float | None
    guide: TeacherConfig | None


@dataclass(frozen=True)
class Method:
    """points: by budget, then seed. sets: by seed. right: which of the test images the students of a seed have right,
    bool [N], as far as that was kept. control: the strong control that it is (dfkd.evaluation.tested), by its settings
    or its name; None for another."""

    points: tuple[Point, ...] = ()
    sets: tuple[ImageSet, ...] = ()
    right: Mapping[int, npt.NDArray[np.bool_]] = field(default_factory=dict)
    control: str | None = None

    @property
    def budgets(self) -> tuple[float | None, ...]:
        """Each once, from the smallest; (None,) where images were made without one."""
        return tuple(dict.fromkeys(point.budget for point in self.points))

    def at(self, budget: float | None) -> dict[int, Point]:
        """Its students of a budget by seed."""
        return {point.seed: point for point in self.points if point.budget == budget}

    @property
    def accuracy(self) -> float | None:
        """Mean over the seeds at the largest budget; None where no student was tested."""
        last = self.at(self.budgets[-1]).values() if self.points else ()
        return sum(point.accuracy for point in last) / len(last) if last else None


@dataclass(frozen=True)
class Entries:
    """methods: in the order given. test: name, split and number of the real images of every folder's students, None
    where no folder tells. first: of the folders and files."""

    methods: Mapping[str, Method]
    test: tuple[str, str, int] | None
    first: Path

    @property
    def reference(self) -> str:
        """The method that others are compared with."""
        return next((name for name in self.methods if own_name(name) == REFERENCE), next(iter(self.methods)))

    def each(self, judged: int) -> int:
        """How many images of every set are judged: as many as asked for, or as the smallest set has."""
        return min([judged, *(len(one.pool.labels) for one in self.sets)]) if self.sets else 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of all images; () of records alone."""
        return self.sets[0].pool.class_names if self.sets else ()

    @property
    def sets(self) -> list[ImageSet]:
        return [one for method in self.methods.values() for one in method.sets]


def own_name(method: str) -> str:
    """A method's name without that of its run or record."""
    return method.rpartition(" / ")[2]


def read_entries(runs: Sequence[str]) -> Entries:
    """Read and check all RUNs; no pixel is decoded.

    Raises UsageError as `read_run` does, and: a RUN that is not there or no record, fewer than two methods, names that
    are given twice, students without a test or tested on other images, images of other classes or another size.
    """
    methods: dict[str, Method] = {}
    named = [_named(text) for text in runs]
    for name, path in named:
        for short, method in (_record(path) if path.is_file() else {}).items():
            full = f"{name} / {short}" if name else short
            if full in methods:
                raise UsageError(f"--compare: two records have '{full}'", todo="tell them apart: NAME=RUN")
            methods[full] = method
    recorded, given = set(methods), set()
    tests: dict[Path, tuple[str, str, int]] = {}
    for name, path in named:
        if path.is_file():
            continue
        run = read_run(path)
        own = name or run.title
        if name is None and own in given:
            why = "runs of one name are seeds of one method where that is said"
            raise UsageError(f"--compare: two runs are called '{own}'", why, "tell them apart, or say so: NAME=RUN")
        given.add(own)
        for full, method in _folder(run, own, own in recorded).items():
            more = replace(method, points=()) if full in recorded else method
            methods[full] = _joined(full, methods.get(full, Method()), more)
        if (tested := accuracy(run)).test is not None:
            tests[path] = (tested.test, tested.split, tested.test_images)
    if len(methods) < 2:
        found = f"only {some_names(tuple(methods))}" if methods else "no method"
        raise UsageError("--compare: nothing to compare", f"there is {found}", "give two runs or more, or a record")
    entries = Entries(methods, next(iter(tests.values()), None), named[0][1])
    _check_tests(tests)
    _check_images(entries)
    return entries


def _named(text: str) -> tuple[str | None, Path]:
    """NAME=RUN or RUN -> the name, None where none is given, and the path. Raises UsageError for one that is absent."""
    name, equals, rest = text.partition("=")
    own, path = (name, Path(rest)) if equals and not Path(text).exists() else (None, Path(text))
    if not path.exists():
        raise UsageError(f"--compare {path}", "there is no such folder or file", "correct the path")
    if path.is_dir() and not (path / "synthetic" / MANIFEST).exists():
        why = f"it holds no synthetic/{MANIFEST}"
        raise UsageError(f"--compare {path}", why, "give a folder of dfkd-run, or a benchmark's record")
    return own, path


def _record(path: Path) -> dict[str, Method]:
    todo = "give a record of the benchmark, or the folder of a run"
    found = read_object(path, _RECORD, todo, needed=("budgets", "methods"))
    methods = {}
    for name, of in found["methods"].items():
        points = []
        for budget in sorted(of.get("accuracy", {}), key=_seconds):
            columns = [of.get(key, {}).get(budget, ()) for key in ("accuracy", "seconds", "images")]
            if len({len(column) for column in columns}) != 1 or not columns[0]:
                why = f"accuracy, seconds and images of {name} at {budget} s are not one each a seed"
                raise UsageError(f"{path} cannot be used", why, todo)
            if not all(0 <= right <= 1 for right in columns[0]):
                why = f"an accuracy of {name} at {budget} s is not in 0..1"
                raise UsageError(f"{path} cannot be used", why, todo)
            points += [
                Point(seed, float(right), float(seconds), int(images), _seconds(budget))
                for seed, (right, seconds, images) in enumerate(zip(*columns, strict=True))
            ]
        kind = name.replace("_", "-")
        methods[name] = Method(tuple(points), control=kind if kind in STRONG else None)
    return methods


def _seconds(budget: str) -> float:
    try:
        return float(budget)
    except ValueError:
        raise UsageError(f"a record has the budget '{budget}'", "budgets are seconds", "give another record") from None


def _folder(run: RunFolder, name: str, known: bool) -> dict[str, Method]:
    """A run's own images and those of its baselines. known: whether a record has the accuracy of its student."""
    tested, images = accuracy(run), run.synthetic
    if tested.student is None and not known:
        what = f"{images.path.parent} has no test on real images"
        todo = "name some as data of [evaluate] or as --test of dfkd-distill, and start that again"
        raise UsageError(what, "methods are compared by the accuracy of their students", todo)
    methods = {name: _method(images.pool, tested.student, images.seconds, run, "student")}
    for base, found in run.baselines.items():
        if found.images is not None:
            right, key = tested.baselines.get(base), f"baselines/{base}"
            method = _method(found.images, right, found.seconds, run, key)
            methods[f"{name} / {base}"] = replace(method, control=strong_kind(found))
    return methods


def _method(pool: ShardPool, right: float | None, seconds: float, run: RunFolder, key: str) -> Method:
    seed = int(pool.settings.get("seed", 0))
    points = () if right is None else (Point(seed, right, seconds, len(pool.labels)),)
    kept = {seed: run.right[key]} if key in run.right else {}
    return Method(points, (ImageSet(seed, pool, right, run.guide),), kept)


def _joined(name: str, before: Method, more: Method) -> Method:
    seeds = [one.seed for one in (*before.sets, *more.sets)]
    if len(set(seeds)) < len(seeds):
        why = f"runs of one name are its seeds, and two have seed {seeds[-1]}"
        raise UsageError(f"--compare: {name}", why, "give runs of different --seed, or different names")
    order = sorted((*before.sets, *more.sets), key=lambda one: one.seed)
    return Method(
        (*before.points, *more.points), tuple(order), {**before.right, **more.right}, before.control or more.control
    )


def _check_tests(tests: Mapping[Path, tuple[str, str, int]]) -> None:
    for path, (data, split, images) in tests.items():
        first, (name, part, count) = next(iter(tests.items()))
        if (split, images) != (part, count) or not same_data(data, name):
            why = f"{first} on {count} {part} images of {name}, {path} on {images} {split} images of {data}"
            raise UsageError("--compare: the runs were tested on different images", why, "test them on the same")


def _check_images(entries: Entries) -> None:
    sets = entries.sets
    for one in sets[1:]:
        own, first = one.pool, sets[0].pool
        if own.class_names != first.class_names:
            why = f"{some_names(first.class_names)}, and {some_names(own.class_names)}"
            raise UsageError("--compare: the runs have different classes", why, "give runs of the same classes")
        if own.image_size != first.image_size:
            why = f"{first.image_size} and {own.image_size} pixels"
            raise UsageError("--compare: the runs have images of different sizes", why, "give runs of one size")
