"""dfkd-distill: synthetic images and a frozen teacher -> a student."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch

from dfkd import teachers
from dfkd.config import NORMALISATIONS
from dfkd.cli.options import command, option, plain, save_settings
from dfkd.cli.progress import progress
from dfkd.cli.teacher import load_teacher
from dfkd.training.checks import check_computation
from dfkd.training.held_out import confusion_matrix, logits_of
from dfkd.training.identity import identity
from dfkd.training.settings import DistillSettings
from dfkd.training.students import DistillResult
from dfkd.training.train import distill
from dfkd.training.world import World, join
from dfkd.errors import UsageError
from dfkd.files import make_writable
from dfkd.runtime import choose_kernels
from dfkd.training.resume import RESULT, read_checkpoint, read_result, write_result
from dfkd.data.shards import open_folder
from dfkd.data.shards.damage import in_words
from dfkd.teachers.classifier import Classifier

COMMAND = "dfkd-distill"


@dataclass(frozen=True)
class _Paths:
    data: Path = option(MISSING, "folder of synthetic images, written by dfkd-generate")
    teacher: str | None = option(None, "architecture of the teacher; a folder of dfkd-train-teacher knows its own")
    teacher_checkpoint: Path | None = option(None, "folder of dfkd-train-teacher, or a .safetensors, .pth or .pt file")
    normalisation: str | None = option(
        None, "mean and standard deviation for a teacher file that states none", choices=tuple(NORMALISATIONS)
    )
    student: str = option(MISSING, "architecture of the student: a name of the zoo, or timm:NAME and the like")
    out: Path = option(MISSING, "folder to write")
    test: str | None = option(None, "real images for one test after the training, as --data of dfkd-train-teacher")
    test_split: str = option("test", "which of them", choices=("test", "validation"))


@dataclass(frozen=True)
class Options(DistillSettings, _Paths):
    """Train a student to answer as a frozen teacher does, on synthetic images alone.

    Writes OUT/last and OUT/best (best on held-out synthetic images), each model.safetensors and config.json;
    OUT/log.jsonl, OUT/settings.json, OUT/checkpoint.pt and OUT/result.json {accuracy, best_accuracy, confusion,
    agreement, seconds, ...}. accuracy is that of the last student. Started again, it goes on where it was stopped;
    SIGTERM stops it at the end of the step. Real images are read only for --test, once, after the training.
    Several processes: torchrun --nproc-per-node N --no-python dfkd-distill ...; --batch-size is of all together.
    """


def run(options: Options) -> dict[str, Any] | None:
    """Check, train what is not trained yet, test, write OUT/result.json; None in all processes but the first."""
    with join(options.device) as world:
        return run_in(world, options)


def run_in(world: World, options: Options) -> dict[str, Any] | None:
    """The same as one of the processes of a run."""
    teachers.check(options.student)
    _check_test(options.test)
    kernels = choose_kernels(options.kernels, world.device)
    check_computation(options, world)
    data = open_folder(options.data, options.on_bad_sample)
    if data.left_out and world.first:
        _say(f"left out: {len(data.left_out)} of {data.layout.count} images: {in_words(data.left_out)}")
    teacher = load_teacher(options.teacher, options.teacher_checkpoint, options.normalisation, data.class_names)
    this_run = plain(identity(data, teacher, options.student, options))
    if (known := world.from_first(lambda: _begin(options, this_run))) is not None:
        return known if world.first else None
    torch.manual_seed(options.seed)
    student = teachers.build(options.student, len(data.class_names))
    with _bar(world.first) as watch:
        trained = distill(
            data, teacher, student, options, options.out,
            architecture=options.student, world=world, watch=watch, say=_say if world.first else _silent,
        )  # fmt: skip
    if not world.first:
        return None
    result = {
        **_tested(options, trained),
        "agreement": trained.agreement,
        "best_agreement": trained.best_agreement,
        "best_step": trained.best_step,
        "steps": trained.steps,
        "skipped": trained.skipped,
        "images": trained.images,
        "left_out": [sample.id for sample in data.left_out],
        "seconds": trained.seconds,
        "device": str(world.device),
        "processes": world.size,
        "kernels": {"name": kernels.name, "why": kernels.why},
        "class_names": data.class_names,
        "out": options.out,
    }
    return write_result(options.out, this_run, plain(result))


def main(argv: Sequence[str] | None = None) -> None:
    sys.exit(command(Options, run, COMMAND, argv))


def _begin(options: Options, this_run: dict[str, Any]) -> dict[str, Any] | None:
    """Prepare the folder; the result of a run that is already finished there."""
    make_writable(options.out)
    if options.resume:
        if (known := _known_result(options, this_run)) is not None:
            return known
        # Refuses another run's folder before anything in it changes.
        read_checkpoint(options.out, this_run, torch.device("cpu"))
    else:
        # The folder's former run must not be taken for finished once its students are gone.
        (options.out / RESULT).unlink(missing_ok=True)
    save_settings(options, options.out, COMMAND)
    return None


def _known_result(options: Options, this_run: dict[str, Any]) -> dict[str, Any] | None:
    """The result of the same run with the same test, where it was finished before."""
    result = read_result(options.out)
    if result is None:
        return None
    same = (result["run"], result["test"], result["test_split"]) == (this_run, options.test, options.test_split)
    return result if same else None


def _tested(options: Options, trained: DistillResult) -> dict[str, Any]:
    """Accuracy of last and best and the confusion matrix of last (rows: truth) on real images; None without a test."""
    named = {"test": options.test, "test_split": options.test_split}
    if options.test is None:
        return {**named, "test_images": 0, "accuracy": None, "best_accuracy": None, "confusion": None}
    # Imported here and not above: until now nothing in this process could read real images.
    from dfkd.evaluation.real_data import load

    size = trained.student.input_size if ":" in options.test else None
    real = load(options.test, options.test_split, size)
    if real.class_names != trained.student.class_names:
        raise UsageError(
            f"{options.test} has the classes {', '.join(real.class_names)}",
            f"the student knows {', '.join(trained.student.class_names)}",
            "the student is trained and saved; give a test of its classes, in its order",
        )
    last, best = (_predictions(classifier, real.images) for classifier in (trained.student, trained.best))
    return {
        **named,
        "test_images": len(real.labels),
        "accuracy": float((last == real.labels).double().mean()),
        "best_accuracy": float((best == real.labels).double().mean()),
        "confusion": confusion_matrix(real.labels, last, len(real.class_names)),
    }


def _predictions(classifier: Classifier, images: torch.Tensor) -> torch.Tensor:
    classifier.module.eval()
    return logits_of(classifier, images).argmax(1).cpu()


def _check_test(name: str | None) -> None:
    """What can be known of a test without reading it."""
    path = (name or "").partition(":")[2]
    if path and "{split}" not in path and not Path(path).exists():
        raise UsageError(f"--test {name}", f"there is no {path}", "correct the path")


@contextmanager
def _bar(shown: bool) -> Iterator[Any]:
    """watch(done, total) of ``distill`` as a progress bar, which begins where a resumed run does."""
    bars: list[Any] = []

    def watch(done: int, total: int) -> None:
        if not shown:
            return
        if not bars:
            bars.append(progress(total, "distilling", "img"))
            bars[0].initial = bars[0].n = done
        bars[0].update(done - bars[0].n)

    try:
        yield watch
    finally:
        for bar in bars:
            bar.close()


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _silent(text: str) -> None:
    """What the first process says is enough."""
