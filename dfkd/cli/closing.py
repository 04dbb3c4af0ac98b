"""The last lines of a command, for people: what was made and where, and a command to go on with."""

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dfkd.config import (
    Config,
    DistillCommand,
    EvaluateCommand,
    ExportCommand,
    GenerateCommand,
    ReportCommand,
    RunCommand,
    TeacherConfig,
    TrainDecoderCommand,
    TrainPriorCommand,
    TrainTeacherCommand,
)
from dfkd_engine import EMBEDDED

Result = Mapping[str, Any]
SMALL = 64  # side of images up to which a student has the stem of CIFAR's networks


def closing(asked: Config, result: Result) -> list[str]:
    """One line or two; [] of a command that has none."""
    return _TOLD[type(asked)](asked, result) if type(asked) in _TOLD else []


def _teacher(asked: TrainTeacherCommand, result: Result) -> list[str]:
    known = _words_of_the_embedded_prior()
    prior = [] if set(result["class_names"]) <= known else ["--prior", "YOUR_PRIOR"]  # which knows those words
    beside = asked.out.parent / "synthetic"
    return [
        f"made: {asked.out}, a {asked.architecture} of accuracy {_percent(result['accuracy'])} on"
        f" {result['test_images']} test images",
        _next("dfkd-generate", "--teacher-checkpoint", asked.out, *prior, "--out", beside),
    ]


def _prior(asked: TrainPriorCommand, result: Result) -> list[str]:
    return [
        f"made: {asked.out}, a prior of {len(result['class_names'])} classes, {result['bytes'] / 1e6:.1f} MB;"
        f" preview.png shows samples",
        _next("dfkd-generate", "--prior", asked.out, "--teacher-checkpoint", "TEACHER", "--out", "IMAGES"),
    ]


def _decoder(asked: TrainDecoderCommand, result: Result) -> list[str]:
    error = f"mean error {255 * result['error']:.1f} of 255 beside the VAE"
    prior = ("--prior", asked.prior.source, "--guidance-decoder", asked.out)
    return [
        f"made: {asked.out}, a decoder of {result['parameters'] / 1e6:.2f} million parameters, {error}",
        _next("dfkd-generate", *prior, "--teacher-checkpoint", "TEACHER", "--out", "IMAGES"),
    ]


def _images(asked: GenerateCommand, result: Result) -> list[str]:
    if asked.plan_only:
        return ["nothing was written; without --plan-only the images are made"]
    student = "resnet18" if result["image_size"] <= SMALL else "resnet18_imagenet"
    words = ["--data", asked.out, *_teacher_words(asked.teacher), "--student", student]
    left_out = f", {result['dropped']} of them left out by the filter" if result.get("dropped") else ""
    return [
        f"made: {asked.out}, {result['images']} images of {len(result['class_names'])} classes{left_out}; preview.png"
        " shows some",
        _next("dfkd-distill", *words, "--out", asked.out.parent / "student"),
    ]


def _student(asked: DistillCommand, result: Result) -> list[str]:
    last, agreement, accuracy = asked.out / "last", result["agreement"], result["accuracy"]
    told = [] if agreement is None else [f"agrees with its teacher on {_percent(agreement)} of held-out images"]
    told += [] if accuracy is None else [f"accuracy {_percent(accuracy)} on {result['test_images']} real images"]
    test = ["dfkd-evaluate", "--checkpoint", last, "--data", "imagefolder:YOUR_IMAGES"]
    return [
        "; ".join([f"made: {last}, a {asked.distill.student}", *told]),
        _next(*(test if accuracy is None else ["dfkd-export", "--checkpoint", last])),
    ]


def _test(asked: EvaluateCommand, result: Result) -> list[str]:
    lines = [f"accuracy {_percent(result['accuracy'])} on {result['images']} images"]
    if asked.checkpoint is not None and asked.checkpoint.is_dir():
        lines.append(_next("dfkd-export", "--checkpoint", asked.checkpoint))
    return lines


def _report(asked: ReportCommand, result: Result) -> list[str]:
    return [f"made: {result['report']}, to be opened in a browser"]


def _export(asked: ExportCommand, result: Result) -> list[str]:
    card = f"; {result['card']} says how it is loaded" if result["card"] else ""
    return [f"made: {result['out']}, {result['bytes'] / 1e6:.1f} MB, within {result['error']:.1g} of torch{card}"]


def _run(asked: RunCommand, result: Result) -> list[str]:
    accuracy = result["accuracy"]
    told = "" if accuracy is None else f"; its student has an accuracy of {_percent(accuracy)}"
    return [
        f"made: {result['report']}, to be opened in a browser{told}",
        _next("dfkd-export", "--checkpoint", Path(result["out"]) / "student/last"),
    ]


_TOLD: dict[type[Config], Callable[[Any, Result], list[str]]] = {
    TrainTeacherCommand: _teacher,
    TrainPriorCommand: _prior,
    TrainDecoderCommand: _decoder,
    GenerateCommand: _images,
    DistillCommand: _student,
    EvaluateCommand: _test,
    ReportCommand: _report,
    ExportCommand: _export,
    RunCommand: _run,
}


def _next(*words: object) -> str:
    return "next: " + shlex.join(map(str, words))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _teacher_words(teacher: TeacherConfig) -> list[str]:
    """The flags that load the teacher again, but for the class names, which the images state."""
    values = {name: value for name, value in teacher.changed().items() if name != "classes"}
    shown = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in values.items()}
    return [str(word) for name, value in shown.items() for word in (f"--{name.replace('_', '-')}", value)]


def _words_of_the_embedded_prior() -> set[str]:
    found: dict[str, Any] = json.loads((EMBEDDED["demo"] / "dfkd.json").read_text(encoding="utf-8"))
    return set(found["labels"])
