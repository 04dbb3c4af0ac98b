"""What the test on real images says: accuracies with intervals, who is wrong, and how far controls were compared.

A control is strong where it uses the teacher's gradient as the guided images do, but guides no diffusion: unguided
samples with gradient steps on their pixels, and DeepInversion, each in about the guided images' seconds. Without them
nothing can be put down to guided diffusion, and so no difference to any baseline is stated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dfkd.evaluation.answers import Bin, Outcomes
from dfkd.evaluation.metrics import interval
from dfkd.evaluation.paired import Difference, difference
from dfkd.evaluation.run_folder import Baseline, RunFolder
from dfkd.evaluation.students import Mistake

STRONG = ("unguided-pixels", "deepinversion")
COMPARABLE = 0.5  # of the guided images' seconds that a strong control takes at least


@dataclass(frozen=True)
class Accuracy:
    """Top-1 on real test images, in 0..1; None where it was not measured.

    interval, teacher_interval: Wilson's 95 %, for the choice of test images alone, not of seeds. behind: the student
    minus the teacher on the same images. baselines: best first. differences: the student minus each baseline's, {}
    unless every strong control was run. missing_controls: the strong ones that were not, and why each does not count.
    matched: of controls whose steps were counted out, how many, and the seconds of a call of theirs and of guided
    images at that moment. chance: 1 / classes. test, split: of the real images.
    """

    student: float | None
    teacher: float | None
    interval: tuple[float, float] | None
    teacher_interval: tuple[float, float] | None
    behind: Difference | None
    baselines: dict[str, float]
    differences: dict[str, Difference]
    missing_controls: dict[str, str]
    matched: dict[str, Mapping[str, float]]
    chance: float
    test: str | None
    split: str
    test_images: int


@dataclass(frozen=True)
class ClassAccuracy:
    """A class of `images` test images, at least one; shares with Wilson's 95 % intervals, None without a teacher."""

    name: str
    images: int
    student: float
    interval: tuple[float, float]
    teacher: float | None
    teacher_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Errors:
    """Who is wrong on the test images, and how sure: see `answers.Evaluation`. classes: those with test images."""

    outcomes: Outcomes | None
    calibration: float | None
    teacher_calibration: float | None
    reliability: tuple[Bin, ...]
    teacher_reliability: tuple[Bin, ...]
    classes: tuple[ClassAccuracy, ...]
    mistakes: tuple[Mistake, ...]


def accuracy(run: RunFolder) -> Accuracy:
    """evaluation.json first; what it does not say is taken from the folders' own results."""
    own, tests = (run.student.result if run.student else {}), run.evaluation
    tested = tests.get("student", own)
    student, images = tested.get("accuracy"), int(tests.get("images", own.get("test_images", 0)))
    teacher = tested.get("teacher_accuracy", run.teacher.result.get("accuracy") if run.teacher else None)
    known = {name: base.student.result.get("accuracy") for name, base in run.baselines.items() if base.student}
    known |= {name: test["accuracy"] for name, test in tests.get("baselines", {}).items()}
    ranked = sorted(((name, float(value)) for name, value in known.items() if value is not None), key=lambda x: -x[1])
    right, missing = run.right, _missing_controls(run, dict(ranked))
    compared = {name: right[f"baselines/{name}"] for name, _ in ranked if f"baselines/{name}" in right and not missing}
    return Accuracy(
        student=student,
        teacher=teacher,
        interval=_interval(student, images),
        teacher_interval=_interval(tested.get("teacher_accuracy"), images),
        behind=difference(right["student"], right["teacher"]) if {"student", "teacher"} <= right.keys() else None,
        baselines=dict(ranked),
        differences={name: difference(right["student"], mask) for name, mask in compared.items()},
        missing_controls=missing,
        matched={name: base.matched for name, base in run.baselines.items() if base.matched},
        chance=1 / len(run.synthetic.pool.class_names),
        test=tests.get("data", own.get("test")),
        split=tests.get("split", own.get("test_split", "test")),
        test_images=images,
    )


def errors(run: RunFolder) -> Errors | None:
    """From evaluation.json; None without one."""
    tested = run.evaluation.get("student")
    if tested is None:
        return None
    counted = tested.get("outcomes")
    bins = ([Bin(**one) for one in tested.get(name) or ()] for name in ("reliability", "teacher_reliability"))
    own, teachers = map(tuple, bins)
    return Errors(
        outcomes=Outcomes(**counted) if counted else None,
        calibration=tested.get("calibration"),
        teacher_calibration=tested.get("teacher_calibration"),
        reliability=own,
        teacher_reliability=teachers,
        classes=_classes(tested, run.synthetic.pool.class_names),
        mistakes=tuple(Mistake(**one) for one in run.evaluation.get("mistakes", ())),
    )


def _classes(tested: Mapping[str, Any], names: tuple[str, ...]) -> tuple[ClassAccuracy, ...]:
    theirs = tested.get("teacher_per_class") or {}
    found = []
    for place, (name, row) in enumerate(zip(names, tested.get("confusion") or (), strict=False)):
        if images := sum(row):
            share, other = row[place] / images, theirs.get(name)
            ours = interval(share, images)
            found.append(ClassAccuracy(name, images, share, ours, other, _interval(other, images)))
    return tuple(found)


def _missing_controls(run: RunFolder, tested: Mapping[str, float]) -> dict[str, str]:
    """The strong controls that no tested baseline stands for, and why."""
    missing = {}
    for kind in STRONG:
        of_kind = {name: base for name, base in run.baselines.items() if strong_kind(base) == kind and name in tested}
        longest = max((base.seconds for base in of_kind.values()), default=0.0)
        if not of_kind:
            missing[kind] = "not run"
        elif longest < COMPARABLE * run.synthetic.seconds and not any(base.matched for base in of_kind.values()):
            missing[kind] = f"its images took {longest:.3g} s, the guided ones {run.synthetic.seconds:.3g} s"
    return missing


def strong_kind(baseline: Baseline) -> str | None:
    """Which strong control the settings of a baseline's images make it, whatever its name; None for another."""
    options = baseline.settings.get("options", {})
    method = options.get("method", "").partition("(")[0]
    if method == "deepinversion":
        return "deepinversion"
    steered = method == "guided" and options.get("guidance_step", 0) > 0
    in_pixels = options.get("guide_from", 0) >= 1 and options.get("refine_steps", 0) > 0
    return "unguided-pixels" if steered and in_pixels else None


def _interval(share: float | None, images: int) -> tuple[float, float] | None:
    return interval(share, images) if share is not None and images else None
