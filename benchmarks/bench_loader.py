"""Loaders: images a second beside what others read the same shards with, and what a loader costs a distillation step.

    python -m benchmarks.bench_loader                 --quick for a rehearsal; --record writes benchmarks/results
    python -m benchmarks.bench_loader --device cuda   batches end there; DALI decodes, and steps run there, in bf16

rates   32x32 PNG, 32x32 npy and 224x224 JPEG in shards: our three sources beside torch's DataLoader with PIL,
        webdataset and Hugging Face datasets, all to cropped, flipped, normalised float32 batches, in turns. A turn
        is an epoch; a way's first epoch is not counted. `resident` has decoded everything before it begins.
steps   the demo's distillation step (networks, batch, views and mixtures of its preset), on a GPU also one of
        ResNet-34 to ResNet-18 on 256 images of 32x32, on batches of each source, beside the same step on one batch
        that is already there, in turns.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.bench_distill import step_of
from benchmarks.flops import in_turns, reason
from benchmarks.loader_ways import MEAN, OTHERS, OURS, STD, epoch_of
from benchmarks.machine import describe
from benchmarks.recording import finish, not_measured, number, ratios, spread, table, taken_on, words
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
from dfkd.runtime import resolve_device
from dfkd.training.mixing import mix
from dfkd.training.step import AMP_DTYPES

NAMES = tuple("abcdefghij")  # of ten classes
SETS = {"32 png": (32, "png", 4000), "32 npy": (32, "npy", 4000), "224 jpg": (224, "jpg", 600)}  # side, format, images
BATCH, SHARDS = 128, 4
STEPS = {"cpu": 30, "cuda": 100}  # of a turn: a tenth of a second at least
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


DEMO = Training(
    "the demo's step", section(read_preset("demo"), "teacher")["architecture"], DistillConfig.preset("demo"), 400
)
_CIFAR = DistillConfig.of(student="resnet18", epochs=1, batch_size=256, augment="crop-flip", temperature=4.0)
CIFAR = Training("a step of resnet34 to resnet18, 256 images,", "resnet34", _CIFAR, 2560)
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


def rates(
    root: Path, sets: Mapping[str, tuple[int, str, int]], turns: int, workers: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each set of images and way of reading it; a way that is not there has an error for its rates."""
    rows = []
    for name, (size, image_format, count) in sets.items():
        folder = make_folder(root / name.replace(" ", "-"), size, image_format, count)
        calls: dict[str, Callable[[], int]] = {}
        failed = {}
        for way in (*OTHERS, *OURS):
            try:
                calls[way] = counting(way, folder, count, workers, device)
            except Exception as error:  # of other people's packages: anything, and the others are still of interest
                failed[way] = reason(error)
        seconds, broken = in_turns(calls, turns, device)
        rows += [{"images": name, "way": way, "error": why} for way, why in (failed | broken).items()]
        for way, spent in seconds.items():
            speed, ratio = spread([count / s for s in spent]), ratios(seconds.get(OTHERS[0]), spent)
            rows.append({"images": name, "way": way, "images_per_second": speed, "ratio": ratio})
    return rows


def counting(way: str, folder: Path, images: int, workers: int, device: torch.device) -> Callable[[], int]:
    """A call that goes through an epoch of `images`; raises RuntimeError where others come."""
    epoch = epoch_of(way, folder, BATCH, workers, device)

    def call() -> int:
        seen = sum(len(batch) for batch in epoch())
        if seen != images:
            raise RuntimeError(f"{seen} of {images} images came")
        return seen

    call()
    return call


class Distillation:
    """The step of a training, on batches of any source."""

    def __init__(self, training: Training, folder: Path, workers: int, device: torch.device, amp: str) -> None:
        self.config = training.config.replace(amp=amp, device=str(device))
        self.descend = step_of(self.config, training.teacher, device)
        self.pool, self.workers = open_folder(folder), workers
        self.order = Order(0, len(self.pool.ids), self.config.train.batch_size, 2**40)
        self.form = Form(self.pool.image_size, MEAN, STD, device, AMP_DTYPES[amp])

    def batches(self, way: str) -> Iterator[Batch]:
        """Raises UsageError where the way is not there."""
        kind, size, positions = self.config.train.augment, self.form.size, torch.arange(len(self.pool.ids))
        auto = choose_loader("auto", len(positions), size, self.form.device)
        choice = auto if way == DEFAULT else STEP_WAYS[way]
        if choice.name == "dali" and not dali_installed():
            raise UsageError("dali", "NVIDIA DALI is not installed")
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


def step_rows(work: Distillation, name: str, turns: int, count: int) -> list[dict[str, Any]]:
    """Milliseconds of a step with each source; slower: how much longer than on one batch in memory, of 1.

    A source that fails has an error. Raises RuntimeError where the step itself does.
    """
    sources: dict[str, Iterator[Batch]] = {}
    failed: dict[str, str] = {}
    for way in (*STEP_WAYS, DEFAULT):
        try:
            sources[way] = work.batches(way)
        except Exception as error:  # such as DALI, which is not there or does not know the GPU
            failed[way] = reason(error)

    def some(way: str) -> None:
        for _ in range(count):
            work.step(next(sources[way]))

    seconds, broken = in_turns({way: partial(some, way) for way in sources}, turns, work.form.device)
    failed |= broken
    if IN_MEMORY in failed:
        raise RuntimeError(f"{IN_MEMORY}: {failed[IN_MEMORY]}")
    rows: list[dict[str, Any]] = [{"step": name, "loader": way, "error": why} for way, why in failed.items()]
    for way, spent in seconds.items():
        slower = spread([mine / base - 1 for base, mine in zip(seconds[IN_MEMORY], spent, strict=True)])
        milliseconds = spread([1000 * s / count for s in spent])
        rows.append({"step": name, "loader": way, "milliseconds": milliseconds, "slower": slower})
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The table of rates, and one of each training's steps."""
    every = [*result["rates"], *result["steps"]]
    failed = [
        (f"{r.get('images') or r['step']}: {r.get('way') or r['loader']}", r["error"]) for r in every if "error" in r
    ]
    cells = [
        [r["images"], r["way"], words(r["images_per_second"]), r["ratio"] and number(r["ratio"]["median"])]
        for r in result["rates"]
        if "error" not in r
    ]
    lines = table(["images", "loader", "images/s: median (min to max)", "ratio"], cells)
    for name in dict.fromkeys(r["step"] for r in result["steps"]):
        own = [r for r in result["steps"] if r["step"] == name and "error" not in r]
        slower = {r["loader"]: f"{100 * r['slower']['median']:.1f} %" for r in own if r["loader"] != IN_MEMORY}
        cells = [[r["loader"], words(r["milliseconds"]), slower.get(r["loader"])] for r in own]
        lines += ["", *table([f"{name} on batches of", "ms: median (min to max)", "slower"], cells)]
    under = (
        f"Batches of {result['batch']}, {result['workers']} workers; ratio: to {OTHERS[0]}. {result['turns']} turns, "
    )
    lines += ["", under + taken_on(result["machine"], "python -m benchmarks.bench_loader")]
    return "\n".join(lines + not_measured(failed))


def bench(
    sets: Mapping[str, tuple[int, str, int]], turns: int, count: int, workers: int, root: Path, device: torch.device,
    amp: str = "off",
) -> dict[str, Any]:  # fmt: skip
    """The result without the machine. count: steps of a turn."""
    found, stepped = rates(root, sets, turns, workers, device), []
    for index, training in enumerate(TRAININGS[device.type]):
        folder = make_folder(root / f"steps-{index}", 32, "png", training.images)
        name = training.name if amp == "off" else f"{training.name} in {amp}"
        stepped += step_rows(Distillation(training, folder, workers, device, amp), name, turns, count)
    return {"rates": found, "steps": stepped, "batch": BATCH, "workers": workers, "turns": turns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=AMP_DTYPES, help="of the steps (default off on a CPU, bf16 on a GPU)")
    parser.add_argument("--repeats", type=int, default=7, help="turns (default 7)")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads that decode (default 2)")
    parser.add_argument("--quick", action="store_true", help="few images and one turn: to see that it works")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/loader-<device>.json")
    a = parser.parse_args()
    if a.record and a.quick:
        parser.error("a rehearsal is not recorded")
    device = resolve_device(a.device)
    machine, amp = describe(device), a.amp or ("off" if device.type == "cpu" else "bf16")
    sets = {name: (side, kind, 140 if a.quick else count) for name, (side, kind, count) in SETS.items()}
    turns, count = (1, 1) if a.quick else (a.repeats, STEPS[device.type])
    with tempfile.TemporaryDirectory() as root:
        result = {"machine": machine, **bench(sets, turns, count, a.workers, Path(root), device, amp)}
    finish(result, markdown(result), "loader" if a.record else "")


if __name__ == "__main__":
    main()
