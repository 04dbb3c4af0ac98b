"""What the other commands left on disk, read for the report. Nothing here opens a real image."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dfkd.config import TeacherConfig, leaves
from dfkd.data import MANIFEST, Record, ShardPool, open_folder, read_manifest
from dfkd.errors import SettingError, UsageError
from dfkd.files import checked_object, read_object
from dfkd.synthesis.controls import STEPS

RESULT, SETTINGS, LOG, EVALUATION = "result.json", "settings.json", "log.jsonl", "evaluation.json"
RIGHT, MISTAKES = "evaluation/right.npz", "evaluation/mistakes.png"

# Shapes of these files, as `read_object` takes them.
_NUMBER = (float, None)
_OUTCOMES = dict.fromkeys(("both_right", "student_only", "teacher_only", "both_wrong", "same_wrong"), int)
_BINS = ([{"images": int, "probability": float, "accuracy": float}], None)
_TEST = {
    **dict.fromkeys(("accuracy", "teacher_accuracy", "agreement", "calibration", "teacher_calibration"), _NUMBER),
    **dict.fromkeys(("per_class", "teacher_per_class"), ({...: _NUMBER}, None)),
    **dict.fromkeys(("reliability", "teacher_reliability"), _BINS),
    "confusion": ([[int]], None),
    "outcomes": (_OUTCOMES, None),
}
_MISTAKE = {"truth": str, "student": str, "teacher": str, "student_probability": float, "teacher_probability": float}
_OPTIONS = {"method": str, "guidance_step": float, "guide_from": float, "refine_steps": int}
_MATCHED = {"steps": int, "guided_seconds_a_call": float, "seconds_a_call": float}
_SETTINGS: dict[str, Any] = {"command": str, "options": _OPTIONS, "versions": {}}
_LINE = {"step": int, ...: float}
_RESULT = {
    **_TEST,
    "class_names": [str],
    "test": (str, None),
    "test_images": int,
    "test_split": str,
    "steps": int,
    "seconds": _NUMBER,
    "run": {"student": (str, None), "data": str},
}
_EVALUATION: dict[str, Any] = {"data": str, "split": str, "images": int, "student": _TEST}
_EVALUATION |= {"baselines": {...: _TEST}, "mistakes": [_MISTAKE]}
_ANEW = "delete the folder evaluation, and start dfkd-run again"


@dataclass(frozen=True)
class Synthetic:
    """A folder of dfkd-generate: pool and records in the order of ids; seconds that its shards took, 0 if unknown."""

    path: Path
    pool: ShardPool
    records: tuple[Record, ...]
    seconds: float
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Trained:
    """A folder of dfkd-train-teacher or dfkd-distill; log has one entry per line of log.jsonl."""

    path: Path
    result: Mapping[str, Any]
    settings: Mapping[str, Any]
    log: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Baseline:
    """Images and student that guided images are compared with; None for what is absent.

    seconds: that its shards took, 0 if unknown. settings: of the images. matched: the steps that take as long as
    the guided images, and how they were counted out, {} where they were not.
    """

    images: ShardPool | None
    student: Trained | None
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    matched: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """A run as it lies on disk.

    evaluation: the tests of evaluation.json, {} without one. right: which of its test images "student", "teacher" and
    "baselines/NAME" have right, bool [N] each, {} where that was not kept. mistakes: thumbnails of the mistakes that it
    names, in their order. guide: how the teacher that guided the images is loaded, None where nothing says so.
    missing: the parts that are not there, and what would supply each. refreshes: of the student, between rounds of
    images, in their order.
    """

    title: str
    synthetic: Synthetic
    teacher: Trained | None
    student: Trained | None
    baselines: Mapping[str, Baseline]
    evaluation: Mapping[str, Any]
    right: Mapping[str, npt.NDArray[np.bool_]]
    mistakes: tuple[Image.Image, ...]
    guide: TeacherConfig | None
    missing: Mapping[str, str]
    refreshes: tuple[Trained, ...] = ()


def read_run(
    run: Path | None, synthetic: Path | None = None, student: Path | None = None, teacher: Path | None = None
) -> RunFolder:
    """Read run/{synthetic,student,teacher,baselines,rounds,evaluation.json}; folders named one by one take their place.

    Only the images are needed. Raises UsageError for a named folder that is not there, images that are absent or
    damaged, a file that is not JSON, and parts whose classes disagree.
    """
    for option, path in (("run", run), ("synthetic", synthetic), ("student", student), ("teacher", teacher)):
        if path is not None and not path.exists():
            raise UsageError(f"--{option} {path}", "there is no such folder", "correct the path")
    images = synthetic or (run / "synthetic" if run else None)
    if images is None:
        raise UsageError("nothing to report on", todo="give --run, or --synthetic")
    if not (images / MANIFEST).exists():
        raise UsageError(f"{images} holds no {MANIFEST}", "the report needs images", "run dfkd-generate first")
    found = _read_synthetic(images)
    parts = {
        "teacher": _read_trained(teacher or (run / "teacher" if run else None)),
        "student": _read_trained(student or (run / "student" if run else None)),
    }
    try:
        guide = _guide(found.settings.get("options", {}), parts["teacher"])
    except SettingError as error:
        raise UsageError(f"{images / SETTINGS} describes no teacher", str(error), "give --teacher") from None
    baselines = _read_baselines(run / "baselines") if run else {}
    wanted = (
        ("teacher", guide, "run dfkd-train-teacher, or give --teacher"),
        ("student", parts["student"], "run dfkd-distill, or give --student"),
        ("baselines", baselines, "name some in the file of dfkd-run, as [baselines.NAME]"),
    )
    missing = {part: todo for part, present, todo in wanted if not present}
    for part, trained in parts.items():
        named = tuple(trained.result.get("class_names", ())) if trained else ()
        if named and named != found.pool.class_names:
            raise UsageError(
                f"{part} and images do not belong together",
                f"{part}: {', '.join(named[:10])}; images: {', '.join(found.pool.class_names[:10])}",
                f"give the {part} of these images",
            )
    evaluation = _json(run / EVALUATION, _EVALUATION) if run else {}
    for test in (parts["student"].result if parts["student"] else {}, evaluation.get("student", {})):
        _check_confusion(test.get("confusion"), len(found.pool.class_names))
    right = _right(run / RIGHT, int(evaluation.get("images", 0))) if run and evaluation else {}
    mistakes = _tiles(run / MISTAKES, len(evaluation.get("mistakes", ()))) if run else ()
    title = (run or images.parent).resolve().name
    teacher_found, student_found = parts["teacher"], parts["student"]
    tests = (evaluation, right, mistakes)
    refreshed = [_read_trained(path) for path in sorted(run.glob("rounds/*/student"))] if run else []
    refreshes = tuple(one for one in refreshed if one is not None)
    return RunFolder(title, found, teacher_found, student_found, baselines, *tests, guide, missing, refreshes)


def _right(path: Path, images: int) -> dict[str, npt.NDArray[np.bool_]]:
    """The masks of `images` test images; {} where the file is absent. Raises UsageError for another content."""
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"cannot read {path}", str(error), _ANEW) from None
    if wrong := [name for name, mask in found.items() if mask.shape != (images,) or mask.dtype != np.bool_]:
        raise UsageError(f"{path}: {wrong[0]}", f"it is no mask of the {images} images of {EVALUATION}", _ANEW)
    return found


def _tiles(path: Path, count: int) -> tuple[Image.Image, ...]:
    """The `count` square tiles of a strip; () where the file is absent or none is wanted."""
    if not path.is_file() or not count:
        return ()
    try:
        strip = Image.open(path).convert("RGB")
    except OSError as error:
        raise UsageError(f"cannot read {path}", str(error), _ANEW) from None
    side = strip.height
    if strip.width != side * count:
        what = f"it is {strip.width}x{side}, and {EVALUATION} names {count} mistakes"
        raise UsageError(f"{path} cannot be used", what, _ANEW)
    return tuple(strip.crop((side * i, 0, side * (i + 1), side)) for i in range(count))


def _check_confusion(matrix: Sequence[Sequence[int]] | None, classes: int) -> None:
    """Raise UsageError for a confusion matrix that is not of so many classes; an absent one is fine."""
    if matrix and (len(matrix) != classes or any(len(row) != classes for row in matrix)):
        what = f"the student's confusion is not of the images' {classes} classes"
        raise UsageError(what, "it has a row and a column for each", "give the student of these images")


def _guide(options: Mapping[str, Any], teacher: Trained | None) -> TeacherConfig | None:
    """The teacher of the folder, else the one that the images' settings name; those also describe a bare file."""
    given = {name: options.get(name) for name in leaves(TeacherConfig) if options.get(name)}
    if teacher is not None:
        kept = leaves(TeacherConfig) if teacher.path.is_file() else ("resize",)  # a folder knows the rest
        described = {name: value for name, value in given.items() if name in kept}
        return TeacherConfig.of(**described | {"teacher_checkpoint": teacher.path})
    config = TeacherConfig.of(**given)
    there = all(Path(source).exists() for source in config.sources) if config.sources else config.teacher is not None
    return config if there else None


def _read_synthetic(path: Path) -> Synthetic:
    pool = open_folder(path)
    return Synthetic(path, pool, tuple(pool.records()), _seconds(path), _json(path / SETTINGS, _SETTINGS))


def _seconds(images: Path) -> float:
    """Seconds that all shards took, and what was found out before the first; 0 where one does not say."""
    layout, shards = read_manifest(images)
    seconds = [float(shard["seconds"]) for shard in shards]
    return sum(seconds) + float(layout.run.get("prepared_seconds", 0)) if all(seconds) else 0.0


def _read_trained(path: Path | None) -> Trained | None:
    """None where there is no such folder; a bare checkpoint file has neither result nor log."""
    if path is None or not path.exists():
        return None
    result, settings = _json(path / RESULT, _RESULT), _json(path / SETTINGS, _SETTINGS)
    return Trained(path, result, settings, _lines(path / LOG))


def _read_baselines(folder: Path) -> dict[str, Baseline]:
    found = {}
    for path in sorted(entry for entry in folder.glob("*") if entry.is_dir()):
        images = path / "synthetic"
        student, settings = _read_trained(path / "student"), _json(images / SETTINGS, _SETTINGS)
        there = (images / MANIFEST).exists()
        pool, seconds = (open_folder(images), _seconds(images)) if there else (None, 0.0)
        found[path.name] = Baseline(pool, student, seconds, settings, _json(path / STEPS, _MATCHED))
    return found


def _json(path: Path, shape: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object of that shape, {} where the file is absent; settings.json and STEPS with every key."""
    needed = shape if shape in (_SETTINGS, _MATCHED) else ()
    return read_object(path, shape, "run again the command that wrote it", needed) if path.is_file() else {}


def _lines(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Entries of a log; a last line that a killed writer left half is dropped."""
    if not path.is_file():
        return ()
    entries, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise UsageError(f"{path}, line {number} is not JSON", str(error)) from None
            break
        entries.append(checked_object(entry, _LINE, f"{path}, line {number}", needed=("step",)))
    return tuple(entries)
