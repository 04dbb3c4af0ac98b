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
    GenerateConfig,
    RoundsConfig,
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
from dfkd.teachers.sources import located
from dfkd.training.distill import check as check_distill
from dfkd.training.distill import warm_start
from dfkd.training.step import check_training
from dfkd.training.world import World

C = TypeVar("C", bound=Config)
Section = Mapping[str, Any]

SECTIONS = ("description", "preset", "teacher", "generate", "rounds", "distill", "evaluate", "controls", "baselines")
TEACHER = set(leaves(TeacherConfig))
# Options of a stage that follow from its place in the run.
OWN = {
    "teacher": {"out"},
    "generate": {"out", "plan_only", *TEACHER} - {"teacher", "classes", "resize"},
    "distill": {"data", "out", "test", "test_split", *TEACHER} - {"teacher", "classes", "resize"},
    "evaluate": {"checkpoint", "reference", "out", *TEACHER},
}
NO_ADVERSARY = {"adv_weight": 0.0, "adv_loss": "kl", "adv_reference": 1.0, "adv_clamp": 0.0}
# Of a set of images that is made before there is a student: whatever would go by one.
NO_STUDENT = {**NO_ADVERSARY, "candidates": 1, "keep": "medium", "keep_weight": 1.0}


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
class Rounds:
    """How guided images and students that learn from them alternate: by phases, the rounds between two refreshes.

    rounds: how many. refresh: how the student is refreshed after a phase; `refreshed` says where, and from what.
    """

    config: RoundsConfig
    rounds: int
    refresh: DistillCommand

    @property
    def phases(self) -> int:
        """How many phases there are; the last one, which may be shorter, is followed by no refresh."""
        return -(-self.rounds // self.config.refresh_every)

    def ids(self, count: int) -> list[range]:
        """The images of each phase. count: of all images."""
        length = count // self.rounds * self.config.refresh_every
        return [range(start, min(start + length, count)) for start in range(0, count, length)]

    def against(self, phase: int) -> bool:
        """Whether the images of a phase, counted from 0, are made against the student refreshed before it."""
        first = self.config.adv_from
        return first is not None and phase * self.config.refresh_every >= first

    def refreshed(self, phase: int) -> DistillCommand:
        """The refresh after a phase, counted from 0, which goes on from the student of the one before."""
        folder = self.refresh.out / f"{phase + 1:03d}" / "student"
        return self.refresh.replace(out=folder, **({"init": self.refreshed(phase - 1).out / "last"} if phase else {}))


@dataclass(frozen=True)
class Job:
    """A run whose sections are checked.

    teacher: its training, None where it exists. classifier: how it is loaded. evaluate: the test, None for none.
    rounds: None where all guided images are made before a student learns.
    """

    out: Path
    teacher: TrainTeacherCommand | None
    classifier: TeacherConfig
    variants: tuple[Variant, ...]
    evaluate: EvaluateCommand | None
    rounds: Rounds | None = None


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
    layers = {name: [section(layer, name) for layer in files] for name in (*OWN, "rounds")}
    presets_own = None
    for stage in ("generate", "distill") if "preset" in file else ():
        presets_own = layers[stage][0].pop("teacher_checkpoint", None)
    teacher, classifier = _teacher(layers["teacher"], layers["generate"], out, seed, presets_own)
    for name in ("generate", "distill") if len(files) > 1 else ():
        for its_own in ("teacher", "resize"):  # the preset's, which [teacher] of the file may have changed
            layers[name][0].pop(its_own, None)
    given = classifier.flat()
    its = {"teacher": teacher.architecture if teacher else classifier.teacher, "resize": classifier.resize}
    baselines: dict[str, list[dict[str, Any]]] = {"": []}
    for layer in files:
        for name, differing in layer.get("baselines", {}).items():
            baselines.setdefault(name, []).append(section({name: differing}, name))
    made = [name for name in _controls(files, controls) if name not in baselines]  # a section of that name comes first
    baselines |= {name: [section({name: CONTROLS[name].settings}, name)] for name in made}
    rounds = _rounds(layers, {**given, "out": out / "rounds", "data": [str(out / "synthetic")]}, seed, its)
    variants = []
    for name, differing in baselines.items():
        folder, where = (out / "baselines" / name, f"baselines.{name}") if name else (out, "generate")
        images, fixed = [*layers["generate"], *differing], {**given, "out": folder / "synthetic"}
        if rounds is not None and rounds.config.adv_from is not None:
            if name:  # made at once, before there is a student
                images = [*layers["generate"], NO_STUDENT, *differing]
            else:
                fixed["student_checkpoint"] = rounds.refreshed(rounds.phases - 2).out / "last"
        if name in made and CONTROLS[name].settings["method"] != "guided":  # a method without the adversarial loss
            chosen = merged(GenerateCommand, *images).get("keep") == "learnable"
            images.append({**NO_ADVERSARY, **({} if chosen else {"student_checkpoint": "none"})})
        generating = _settings(GenerateCommand, where, "generate", images, fixed, seed, its)
        fixed = {**given, "out": folder / "student", "data": [str(folder / "synthetic")]}
        learning = _settings(DistillCommand, "distill", "distill", layers["distill"], fixed, seed, its)
        variants.append(Variant(name, generating, learning, name in made))
    test = None
    if any(layers["evaluate"]):
        test = _settings(EvaluateCommand, "evaluate", "evaluate", layers["evaluate"], {})
    job = Job(out, teacher, classifier, tuple(variants), test, rounds)
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
    """The names in `controls` of the last layer that has any say, and these. Raises UsageError for one that is none."""
    own = [layer["controls"] for layer in files if "controls" in layer]
    layers = [*own[-1:], more]
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


def _rounds(layers: Mapping[str, Sequence[Section]], fixed: Section, seed: int, its: Section) -> Rounds | None:
    """What [rounds] says: its own options, and where a refresh differs from [distill]; None without such a section."""
    own, learning = leaves(RoundsConfig), leaves(DistillCommand)
    if not any(layers["rounds"]):
        return None
    for name in (name for layer in layers["rounds"] for name in layer if name not in {*own, *learning}):
        what = f"[rounds] {name.replace('_', '-')}: unknown option"
        raise UsageError(what, nearest(name, [*own, *learning]), "See docs/rounds.md, and dfkd-distill --help")
    try:
        asked = [{name: value for name, value in layer.items() if name in own} for layer in layers["rounds"]]
        config = RoundsConfig.of(**merged(RoundsConfig, *asked))
    except ValueError as error:
        raise UsageError(f"[rounds] {error}", todo="See docs/rounds.md") from None
    if config.rounds is None:
        return None
    _check_student(config, layers["generate"])
    _settings(DistillCommand, "distill", "distill", layers["distill"], fixed, seed, its)  # its faults are told as its
    differing = [{name: value for name, value in layer.items() if name not in own} for layer in layers["rounds"]]
    refresh = _settings(DistillCommand, "rounds", "distill", [*layers["distill"], *differing], fixed, seed, its)
    return Rounds(config, config.rounds, refresh)


def _check_student(config: RoundsConfig, images: Sequence[Section]) -> None:
    """Raise UsageError unless images go by a student where the rounds have one for them, and nowhere else."""
    asked = merged(GenerateCommand, *images)
    given = asked.get("student_checkpoint") not in (None, "none")
    try:
        own = GenerateConfig.of(**{name: value for name, value in asked.items() if name in leaves(GenerateConfig)})
    except ValueError:  # which the stage puts into words
        return
    # whether another method goes by a student, it says itself
    takes = own.takes_student if own.method == "guided" else config.adv_from is not None
    if config.adv_from is None and takes and not given:
        why, todo = "none is named", "give [rounds] adv-from, or [generate] student-checkpoint"
        raise UsageError("[generate] adv-weight, or keep learnable, goes by a student", why, todo)
    if config.adv_from is not None and not takes:
        why, todo = "nothing in [generate] goes by a student", "give adv-weight there, or leave it out"
        raise UsageError(f"[rounds] adv-from {config.adv_from} cannot act", why, todo)
    if config.adv_from is not None and given:
        why, todo = "with [rounds] adv-from it is the one refreshed last", "leave out one of the two"
        raise UsageError("[generate] student-checkpoint", why, todo)


_COMMANDS = {name: f"dfkd-{name}" for name in OWN} | {"teacher": "dfkd-train-teacher"}


def _teacher(
    layers: Sequence[Section], images: Sequence[Section], out: Path, seed: int, presets_own: str | None = None
) -> tuple[TrainTeacherCommand | None, TeacherConfig]:
    """The teacher's training, or None, and how the teacher is loaded; classes and resize may stand in [generate].

    presets_own: the checkpoint that a preset's commands go by, which counts where no layer names a teacher.
    """
    generate, own, whole = merged(GenerateCommand, *images), layers[-1], merged(TrainTeacherCommand, *layers)
    if presets_own is not None and not any({"data", "checkpoint", "clients"} & layer.keys() for layer in layers):
        own = {"checkpoint": presets_own, **(own if len(layers) > 1 else {})}
    classes, resize = generate.get("classes", ()), whole.get("resize") or generate.get("resize")
    if "data" in whole and "checkpoint" not in own and "clients" not in own:
        training = _settings(TrainTeacherCommand, "teacher", "teacher", layers, {"out": out / "teacher"}, seed)
        return training, TeacherConfig.of(teacher_checkpoint=out / "teacher", classes=classes, resize=resize)
    names = {leaf.path[-1]: name for name, leaf in leaves(TeacherConfig).items()} | {"architecture": "teacher"}
    if unknown := [name for name in own if name not in names]:
        known = "known of a teacher that exists are " + ", ".join(names)
        raise UsageError(f"[teacher] {unknown[0].replace('_', '-')}", known, "give `data` to train one")
    values = {names[name]: value for name, value in own.items()}
    if "clients" not in own and not located(str(own.get("checkpoint"))).is_dir():  # a folder knows its architecture
        values.setdefault("teacher", whole.get("architecture"))
    if not {"checkpoint", "clients"} & own.keys() and ":" not in str(values["teacher"]):
        why = "it is trained on `data`, or it exists as `checkpoint`, or several as `clients`"
        todo = "give one of these"
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
    elif job.classifier.checkpoint is not None and not located(job.classifier.checkpoint).exists():
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
        if variant.distill.init is not None:
            warm_start(variant.distill.init, config)
        synthesis.check(variant.generate, student_comes=job.rounds is not None and not variant.name)
    if job.rounds is not None:
        _check_rounds(job.rounds, job.variants[0].generate)
    if (training := job.teacher) is not None and (names := class_names_of(training.data)):
        side = training.input_size or teachers.input_size(training.architecture)
        check_students(job, Classifier(nn.Identity(), names, (0.5,) * 3, (0.5,) * 3, side))  # fed as it will be
    if any(named := [variant.generate.generate.sampling.only for variant in job.variants]):
        names = _class_names(job)
        for only in named if names else ():
            chosen_classes(names, only)


def _check_rounds(rounds: Rounds, images: GenerateCommand) -> None:
    """Raise UsageError for images that the rounds cannot share, and settings of a refresh that cannot work."""
    config, count = rounds.refresh.distill, images.count
    if count % rounds.rounds:
        todo = f"take a multiple of {rounds.rounds} as count, or other rounds"
        raise UsageError(f"[rounds] rounds {rounds.rounds} with {count} images", "they do not share them evenly", todo)
    length, group = len(rounds.ids(count)[0]), synthesis.group_of(images.generate)
    if length % group:
        why = f"a phase of {rounds.config.refresh_every} rounds has {length} images, and so many are made together"
        todo = "take a group that divides a phase, with all images that are kept of a trajectory"
        raise UsageError(f"[generate] group {group} with [rounds]", why, todo)
    if (shard := images.generate.shards.shard_size) and length % shard:
        why = f"each phase has {length} images, and ends a shard"
        raise UsageError(f"[generate] shard-size {shard} with [rounds]", why, f"give a divisor of {length}, or none")
    teachers.check(config.student)
    check_distill(config, World(resolve_device(config.train.compute.device)))
    if rounds.refresh.init is not None:
        warm_start(rounds.refresh.init, config)


def check_students(job: Job, teacher: Classifier) -> None:
    """Raise UsageError where a student cannot be trained with a teacher of these classes and this input size."""
    count = min(variant.generate.count for variant in job.variants)
    asked = [(job.variants[0].distill.distill, count)]
    if job.rounds is not None:
        asked.append((job.rounds.refresh.distill, len(job.rounds.ids(job.variants[0].generate.count)[0])))
    for config, images in asked:
        check_distill(config, World(resolve_device(config.train.compute.device)), teacher, images)


def _class_names(job: Job) -> tuple[str, ...]:
    """The teacher's classes; () where they are not known before it is trained or fetched."""
    if job.teacher is not None:
        return class_names_of(job.teacher.data)
    there = job.classifier.checkpoint or job.classifier.clients
    return job.classifier.classes or (load_teacher(job.classifier).class_names if there else ())
