"""Loaders: images a second beside what others read the same shards with, and what a loader costs a distillation step.

    python -m benchmarks.bench_loader
    python -m benchmarks.bench_loader --device cuda   batches end there; DALI decodes, and steps run there, in bf16

an epoch   32x32 PNG, 32x32 npy and 224x224 JPEG in shards: our three sources beside torch's DataLoader with PIL,
           webdataset and Hugging Face datasets, all to cropped, flipped, normalised float32 batches. `resident` has
           decoded everything before it begins.
a step     the demo's distillation step (networks, batch, views and mixtures of its preset), on a GPU also one of
           ResNet-34 to ResNet-18 on 256 images of 32x32, on batches of each source, beside the same step on one batch
           that is already there.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import driver
from benchmarks.bench_distill import step_of
from benchmarks.driver import Group, Work
from benchmarks.loader_ways import MEAN, OTHERS, OURS, STD, epoch_of
from dfkd.config import DistillConfig, read_preset, section
from dfkd.data import (
    Batch,
    Form,
    LoaderChoice,
    Order,
    Record,
    ShardFolder,
    choose_loader,
    dali_installed,
    open_folder,
    open_source,
    steps,
)
from dfkd.errors import UsageError
from dfkd.training.mixing import mix
from dfkd.training.step import AMP_DTYPES

NAMES = tuple("abcdefghij")  # of ten classes
Sets = Mapping[str, tuple[int, str, int]]  # side, format, images
SETS: Sets = {"32 png": (32, "png", 4000), "32 npy": (32, "npy", 4000), "224 jpg": (224, "jpg", 600)}
BATCH, SHARDS = 128, 4
IN_MEMORY, DEFAULT = "one batch in memory", "the default loader"
STEP_WAYS = {
    IN_MEMORY: LoaderChoice("resident", ""),
    "dali, decoding": LoaderChoice("dali", ""),
    "dali, decoded once": LoaderChoice("dali", "", kept=True),
    "resident": LoaderChoice("resident", ""),
    "torch": LoaderChoice("torch", ""),
}


@dataclass(frozen=True)
class Training:
    """What takes the batches. name: of its step, for people. images: in all."""

    name: str
    teacher: str
    config: DistillConfig
    images: int


_TEACHER = str(section(read_preset("demo"), "teacher")["architecture"])
_CIFAR = DistillConfig.of(student="resnet18", epochs=1, batch_size=256, augment="crop-flip", temperature=4.0)
DEMO = Training("a step of the demo", _TEACHER, DistillConfig.preset("demo"), 400)
CIFAR = Training("a step of resnet34 to resnet18", "resnet34", _CIFAR, 2560)
TRAININGS = {"cpu": (DEMO,), "cuda": (DEMO, CIFAR)}


def make_folder(path: Path, size: int, image_format: str, count: int) -> Path:
    """Smooth random images, which compress about as photos do."""
    random = np.random.default_rng(0)
    with ShardFolder.create_or_open(path, {}, NAMES, size, image_format, count, -(-count // SHARDS)) as folder:
        for index in folder.missing():
            ids = folder.layout.ids(index)
            coarse = random.integers(0, 256, (len(ids), max(4, size // 8), max(4, size // 8), 3), dtype=np.uint8)
            images = [np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC)) for x in coarse]
            folder.write(index, np.stack(images), [Record(i, i % 10, NAMES[i % 10], 0, "an image") for i in ids])
    return path


def epoch(way: str, path: Path, of: tuple[int, str, int], workers: int, device: torch.device) -> Work:
    """An epoch of a set in the folder `path`, made where it is not there. Raises RuntimeError where images lack."""
    images, batches = of[2], epoch_of(way, make_folder(path, *of), BATCH, workers, device)

    def call() -> int:
        seen = sum(len(batch) for batch in batches())
        if seen != images:
            raise RuntimeError(f"{seen} of {images} images came")
        return seen

    call()
    return Work(call, images)


class Distillation:
    """The step of a training, on batches of any source."""

    def __init__(self, training: Training, path: Path, workers: int, device: torch.device, amp: str) -> None:
        self.config = training.config.replace(amp=amp, device=str(device))
        self.descend = step_of(self.config, training.teacher, device)
        self.pool, self.workers = open_folder(make_folder(path, 32, "png", training.images)), workers
        self.order = Order(0, len(self.pool.ids), self.config.train.batch_size, 2**40)
        self.form = Form(self.pool.image_size, MEAN, STD, device, AMP_DTYPES[amp])

    def work(self, way: str) -> Work:
        """A step. Raises UsageError where the way is not there."""
        batches = self.batches(way)
        return Work(lambda: self.step(next(batches)), self.order.batch_size)

    def batches(self, way: str) -> Iterator[Batch]:
        kind, size, positions = self.config.train.augment, self.form.size, torch.arange(len(self.pool.ids))
        auto = choose_loader("auto", len(positions), size, self.form.device)
        choice = auto if way == DEFAULT else STEP_WAYS[way]
        if choice.name == "dali" and not dali_installed():
            raise UsageError("NVIDIA DALI is not installed")
        source = open_source(choice, self.pool, positions, self.form, kind, self.order.batch_size, self.workers)
        found = source.batches(steps(self.order, kind, size, 0))
        if way != IN_MEMORY:
            return found
        one = next(found)
        return iter(lambda: one, None)

    def step(self, batch: Batch) -> torch.Tensor:
        assert batch.random is not None
        images = mix(batch.images, self.config.mix, self.config.mix_alpha, batch.random, len(batch.images))
        return self.descend(images.contiguous(memory_format=torch.channels_last), batch.labels, 1e-3)


def groups(
    device: torch.device, root: Path, workers: int, sets: Sets = SETS, amp: str | None = None, stepped: bool = True
) -> list[Group]:
    """An epoch of every set, and where `stepped` the device's trainings. amp: of the steps; None: bf16 on a GPU."""
    found = []
    for name, of in sets.items():
        path = root / name.replace(" ", "-")
        rows = {way: partial(epoch, way, path, of, workers, device) for way in (*OTHERS, *OURS)}
        found.append(Group(f"an epoch of {name}", OTHERS[0], rows))
    kind = amp or ("off" if device.type == "cpu" else "bf16")
    for index, training in enumerate(TRAININGS[device.type] if stepped else ()):
        made = cache(partial(Distillation, training, root / f"steps-{index}", workers, device, kind))
        rows = {way: partial(_step, made, way) for way in (*STEP_WAYS, DEFAULT)}
        found.append(Group(training.name, IN_MEMORY, rows))
    return found


def _step(made: Callable[[], Distillation], way: str) -> Work:
    return made().work(way)


def main() -> None:
    parser = driver.parser(__doc__)
    parser.add_argument("--amp", choices=AMP_DTYPES, help="of the steps (default off on a CPU, bf16 on a GPU)")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads that decode (default 2)")
    parser.add_argument("--quick", action="store_true", help="few images, never recorded: to see that it works")
    a = parser.parse_args()
    if a.record and a.quick:
        parser.error("a rehearsal is not recorded")
    sets = {name: (side, kind, 140 if a.quick else count) for name, (side, kind, count) in SETS.items()}
    with tempfile.TemporaryDirectory() as root:
        note = f"Batches of {BATCH}, {a.workers} workers. "
        driver.run(groups(a.device, Path(root), a.workers, sets, a.amp), a, "bench_loader", note=note)


if __name__ == "__main__":
    main()
