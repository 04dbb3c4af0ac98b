"""A run as its file describes it: the sections of TOML, checked, as the settings of every stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from dfkd import teachers
from dfkd.config import (
    Config,
    DistillCommand,
    EvaluateCommand,
    GenerateCommand,
    TeacherConfig,
    TrainTeacherCommand,
    leaves,
    merged,
    read_preset,
    section,
)
from dfkd.config.words import nearest
from dfkd.errors import UsageError
from dfkd.evaluation import check_data, class_names_of, open_test
from dfkd.evaluation.accuracy import match_classes
from dfkd.runtime import resolve_device
from dfkd.synthesis import command as synthesis
from dfkd.synthesis.controls import CONTROLS
from dfkd.synthesis.prompts import chosen_classes
from dfkd.teachers import Classifier, load_teacher
from dfkd.training.distill import check as check_distill
from dfkd.training.step import check_training
from dfkd.training.world import World

C = TypeVar("C", bound=Config)
Section = Mapping[str, Any]

SECTIONS = ("description", "preset", "teacher", "generate", "distill", "evaluate", "controls", "baselines")
TEACHER = set(leaves(TeacherConfig))
# Options of a stage that follow from its place in the run.
OWN = {
    "teacher": {"out"},
    "generate": {"out", "plan_only", *TEACHER} - {"teacher", "classes", "resize"},
    "distill": {"data", "out", "test", "test_split", *TEACHER} - {"teacher", "classes", "resize"},
    "evaluate": {"checkpoint", "reference", "out", *TEACHER},
}


@dataclass(frozen=True)
class Variant:
    """A set of images and the student that learns from it; name "" is the guided images, any other a baseline.

    control: whether it is one of `controls`, whose steps may follow from the seconds of the guided images.
    """

    name: str
    generate: GenerateCommand
    distill: DistillCommand
    control: bool = False


@dataclass(frozen=True)
class Job:
    """A run whose sections are checked.

    teacher: its training, None where it exists. classifier: how it is loaded. evaluate: the test, None for none.
    """

    out: Path
    teacher: TrainTeacherCommand | None
    classifier: TeacherConfig
    variants: tuple[Variant, ...]
    evaluate: EvaluateCommand | None


def read_job(file: Section, out: Path, seed: int = 0, controls: Sequence[str] = ()) -> Job:
    """The run that a file describes. seed: of every stage whose section names none. controls: beside those of the file.

    Raises UsageError, naming the section: an unknown section or option, a value that does not fit, a teacher, data set,
    architecture or method that does not exist; and UsageError or EngineError for what a stage would refuse later, as
    far as it is known without a teacher.
    """
    try:
        files = [read_preset(file["preset"]), file] if "preset" in file else [file]
    except ValueError as error:
        raise UsageError(str(error)) from None
    _check_names(files)
    layers = {name: [section(layer, name) for layer in files] for name in OWN}
    teacher, classifier = _teacher(layers["teacher"], layers["generate"], out, seed)
    for name in ("generate", "distill") if len(files) > 1 else ():
        layers[name][0].pop("resize", None)  # the preset's, which [teacher] of the file may have changed
    given = classifier.flat()
    its = {"teacher": teacher.architecture if teacher else classifier.teacher, "resize": classifier.resize}
    baselines: dict[str, list[dict[str, Any]]] = {"": []}
    for layer in files:
        for name, differing in layer.get("baselines", {}).items():
            baselines.setdefault(name, []).append(section({name: differing}, name))
    made = [name for name in _controls(files, controls) if name not in baselines]  # a section of that name comes first
    baselines |= {name: [section({name: CONTROLS[name].settings}, name)] for name in made}
    variants = []
    for name, differing in baselines.items():
        folder, where = (out / "baselines" / name, f"baselines.{name}") if name else (out, "generate")
        images = [*layers["generate"], *differing]
        fixed = {**given, "out": folder / "synthetic"}
        generating = _settings(GenerateCommand, where, "generate", images, fixed, seed, its)
        fixed = {**given, "out": folder / "student", "data": [str(folder / "synthetic")]}
        learning = _settings(DistillCommand, "distill", "distill", layers["distill"], fixed, seed, its)
        variants.append(Variant(name, generating, learning, name in made))
    test = None
    if any(layers["evaluate"]):
        test = _settings(EvaluateCommand, "evaluate", "evaluate", layers["evaluate"], {})
    job = Job(out, teacher, classifier, tuple(variants), test)
    _check(job)
    return job


def _check_names(files: Sequence[Section]) -> None:
    """Raise UsageError for an unknown section, one that is none, and a baseline whose name is no folder's."""
    for name, content in ((name, content) for file in files for name, content in file.items()):
        if name not in SECTIONS:
            raise UsageError(f"unknown section [{name}] in the run's file", nearest(name, SECTIONS))
        if name in (*OWN, "baselines") and not isinstance(content, Mapping):
            raise UsageError(f"{name} is {content!r}", "it is a section", f"write [{name}] and its options below")
        for inner, differing in content.items() if name == "baselines" else ():
            if not isinstance(differing, Mapping) or Path(inner).name != inner or not inner:
                raise UsageError(f"[baselines] {inner}", "a baseline is a section", "write [baselines.NAME]")


def _controls(files: Sequence[Section], more: Sequence[str]) -> tuple[str, ...]:
    """The names in `controls` of every layer, and these. Raises UsageError for one that is none."""
    layers = [*(layer.get("controls", ()) for layer in files), more]
    if wrong := [layer for layer in layers if isinstance(layer, str) or not isinstance(layer, Sequence)]:
        raise UsageError(f"controls is {wrong[0]!r}", "it is a list of names", 'write controls = ["unguided"]')
    for name in (names := tuple(dict.fromkeys(name for layer in layers for name in layer))):
        if name not in CONTROLS:
            raise UsageError(f"controls: there is no {name!r}", f"there are {', '.join(CONTROLS)}")
    return names


def _settings(
    cls: type[C],
    where: str,
    stage: str,
    layers: Sequence[Section],
    fixed: Section,
    seed: int | None = None,
    its: Section | None = None,
) -> C:
    """A stage's settings: the run's seed, then the sections of preset and file, then what the run itself sets.

    its: what the teacher is known to be, by option; a section may repeat it.
    """
    known = leaves(cls)
    for name, value in ((name, value) for layer in layers for name, value in layer.items()):
        shown = f"[{where}] {name.replace('_', '-')}"
        if name in OWN[stage]:
            raise UsageError(shown, "the run sets it itself", "leave it out; a teacher is described in [teacher]")
        if its and its.get(name) not in (None, value):
            raise UsageError(f"{shown} is {value}", f"[teacher] says {its[name]}", "leave it out here")
        if name not in known:
            raise UsageError(f"{shown}: unknown option", nearest(name, known), f"See {_COMMANDS[stage]} --help")
    try:
        defaults = {} if seed is None else {"seed": seed}
        return cls.of(**merged(cls, defaults, *layers, fixed))
    except ValueError as error:
        raise UsageError(f"[{where}] {error}", todo=f"See {_COMMANDS[stage]} --help") from None


_COMMANDS = {name: f"dfkd-{name}" for name in OWN} | {"teacher": "dfkd-train-teacher"}


def _teacher(
    layers: Sequence[Section], images: Sequence[Section], out: Path, seed: int
) -> tuple[TrainTeacherCommand | None, TeacherConfig]:
    """The teacher's training, or None, and how the teacher is loaded; classes and resize may stand in [generate]."""
    generate, own, whole = merged(GenerateCommand, *images), layers[-1], merged(TrainTeacherCommand, *layers)
    classes, resize = generate.get("classes", ()), whole.get("resize") or generate.get("resize")
    if "data" in whole and "checkpoint" not in own:
        training = _settings(TrainTeacherCommand, "teacher", "teacher", layers, {"out": out / "teacher"}, seed)
        return training, TeacherConfig.of(teacher_checkpoint=out / "teacher", classes=classes, resize=resize)
    names = {leaf.path[-1]: name for name, leaf in leaves(TeacherConfig).items()} | {"architecture": "teacher"}
    if unknown := [name for name in own if name not in names]:
        known = "known of a teacher that exists are " + ", ".join(names)
        raise UsageError(f"[teacher] {unknown[0].replace('_', '-')}", known, "give `data` to train one")
    values = {names[name]: value for name, value in own.items()}
    if not Path(str(own.get("checkpoint"))).is_dir():  # such a folder knows its architecture
        values.setdefault("teacher", whole.get("architecture"))
    if "checkpoint" not in own and ":" not in str(values["teacher"]):
        why, todo = "it is trained on `data`, or it exists as `checkpoint`", "give one of the two"
        raise UsageError("[teacher] says neither how it is trained nor where it is", why, todo)
    try:
        return None, TeacherConfig.of(**{"classes": classes, "resize": resize, **values})
    except ValueError as error:
        raise UsageError(f"[teacher] {error}") from None


def _check(job: Job) -> None:
    """Raise UsageError or EngineError for what can be known to be absent or wrong before the first stage."""
    if job.teacher is not None:
        train = job.teacher.training.train
        teachers.check(job.teacher.architecture)
        for split in ("train", "test"):
            check_data("[teacher] data", job.teacher.data, split)
        check_training(train, World(resolve_device(train.compute.device)))
    elif job.classifier.checkpoint is not None and not job.classifier.checkpoint.exists():
        raise UsageError(f"[teacher] checkpoint {job.classifier.checkpoint}", "there is no such file or folder")
    elif job.classifier.teacher is not None:
        teachers.check(job.classifier.teacher)
    if job.evaluate is not None:
        check_data("[evaluate] data", job.evaluate.data, job.evaluate.split)
        if job.teacher is not None and (names := class_names_of(job.teacher.data)):
            match_classes(open_test(job.evaluate.data, job.evaluate.split, 32), names)
        resolve_device(job.evaluate.device)
    for variant in job.variants:
        config = variant.distill.distill
        teachers.check(config.student)
        check_distill(config, World(resolve_device(config.train.compute.device)))
        synthesis.check(variant.generate)
    if (training := job.teacher) is not None and (names := class_names_of(training.data)):
        side = training.input_size or teachers.input_size(training.architecture)
        check_students(job, Classifier(nn.Identity(), names, (0.5,) * 3, (0.5,) * 3, side))  # fed as it will be
    if any(named := [variant.generate.generate.sampling.only for variant in job.variants]):
        names = _class_names(job)
        for only in named if names else ():
            chosen_classes(names, only)


def check_students(job: Job, teacher: Classifier) -> None:
    """Raise UsageError where the student cannot be trained with a teacher of these classes and this input size."""
    config = job.variants[0].distill.distill
    count = min(variant.generate.count for variant in job.variants)
    check_distill(config, World(resolve_device(config.train.compute.device)), teacher, count)


def _class_names(job: Job) -> tuple[str, ...]:
    """The teacher's classes; () where they are not known before it is trained or fetched."""
    if job.teacher is not None:
        return class_names_of(job.teacher.data)
    return job.classifier.classes or (load_teacher(job.classifier).class_names if job.classifier.checkpoint else ())
