"""Loaders: images a second beside what others read the same shards with, and what a loader costs a distillation step.

python -m benchmarks.bench_loader                 --quick for a rehearsal; --record writes benchmarks/results
python -m benchmarks.bench_loader --device cuda   batches end there; DALI decodes there, and steps run there, in bf16

rates   32x32 PNG, 32x32 npy and 224x224 JPEG in shards: our three sources beside torch's DataLoader with PIL,
        webdataset and Hugging Face datasets, all to cropped, flipped, normalised float32 batches, in turns. A turn
        is an epoch; a way's first epoch is not counted. `resident` has decoded everything before it begins.
steps   the demo's distillation step (networks, batch, views and mixtures of its preset), on a GPU also one of
        ResNet-34 to ResNet-18 on 256 images of 32x32, on batches of each source, beside the same step on one batch
        that is already there, in turns.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.flops import in_turns, reason
from benchmarks.loader_ways import MEAN, OTHERS, OURS, STD, epoch_of
from benchmarks.machine import describe, name_of
from dfkd import teachers
from dfkd.runtime import resolve_device
from dfkd.training.checks import AMP_DTYPES
from dfkd.training.losses import distillation_loss
from dfkd.training.mixing import mix
from dfkd.errors import UsageError
from dfkd.files import replace_text
from dfkd.runtime import choose_kernels
from dfkd.data.loader import Batch, Form, LoaderChoice, Order, choose, dali, open_source
from dfkd.data.loader import steps as steps_of
from dfkd.presets import PRESETS
from dfkd.data.shards import Record, ShardFolder, open_folder

RESULTS = Path(__file__).parent / "results"
# Name: side, format, images.
SETS = {"32 png": (32, "png", 4000), "32 npy": (32, "npy", 4000), "224 jpg": (224, "jpg", 600)}
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
    """What takes the batches.

    name: of its step, for people. settings: as of a preset's dfkd-distill. images: in all.
    """

    name: str
    teacher: str
    settings: dict[str, Any]
    images: int


PLAIN = {"temperature": 4.0, "mix": "none", "mix_alpha": 1.0}
DEMO = Training(
    "the demo's step",
    str(PRESETS["demo"].train_teacher["architecture"]),
    {**PLAIN, **PRESETS["demo"].distill},
    400,
)
CIFAR = Training(
    "a step of resnet34 to resnet18, 256 images,",
    "resnet34",
    {**PLAIN, "student": "resnet18", "batch_size": 256, "augment": "crop-flip"},
    2560,
)
TRAININGS = {"cpu": (DEMO,), "cuda": (DEMO, CIFAR)}


def make_folder(path: Path, size: int, image_format: str, count: int) -> Path:
    """Smooth random images, which compress about as photos do."""
    random = np.random.default_rng(0)
    shard = -(-count // SHARDS)
    with ShardFolder.create_or_open(path, {}, tuple("abcdefghij"), size, image_format, count, shard) as folder:
        for index in folder.missing():
            ids = folder.layout.ids(index)
            coarse = random.integers(0, 256, (len(ids), max(4, size // 8), max(4, size // 8), 3), dtype=np.uint8)
            images = [np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC)) for x in coarse]
            records = [Record(i, i % 10, "abcdefghij"[i % 10], 0, "an image") for i in ids]
            folder.write(index, np.stack(images), records)
    return path


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rates(
    root: Path, sets: dict[str, tuple[int, str, int]], turns: int, workers: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each set of images and way of reading it; a way that is not there has an error for its rates."""
    rows = []
    for name, (size, image_format, count) in sets.items():
        folder = make_folder(root / name.replace(" ", "-"), size, image_format, count)
        calls: dict[str, Callable[[], int]] = {}
        for way in (*OTHERS, *OURS):
            try:
                epoch = epoch_of(way, folder, BATCH, workers, device)
                calls[way] = lambda epoch=epoch: sum(len(images) for images in epoch())  # type: ignore[misc]
                seen = calls[way]()
                if seen != count:
                    raise RuntimeError(f"{seen} of {count} images came")
            except Exception as error:  # of other people's packages: anything, and the others are still of interest
                calls.pop(way, None)
                rows.append({"images": name, "way": way, "error": reason(error)})
        seconds, failed = in_turns(calls, turns, device)
        rows += [{"images": name, "way": way, "error": why} for way, why in failed.items()]
        found = {way: [count / spent for spent in values] for way, values in seconds.items()}
        base = statistics.median(found["DataLoader + PIL"]) if "DataLoader + PIL" in found else None
        for way, values in found.items():
            ratio = statistics.median(values) / base if base else None
            rows.append({"images": name, "way": way, "images_per_second": spread(values), "ratio": ratio})
    return rows


class Distillation:
    """A step of `training` on batches of any source. amp: of AMP_DTYPES."""

    def __init__(self, training: Training, folder: Path, workers: int, device: torch.device, amp: str) -> None:
        self.settings, self.device, self.amp = training.settings, device, amp
        torch.manual_seed(0)
        self.teacher = self._network(training.teacher).eval()
        self.student = self._network(str(self.settings["student"]))
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-3, momentum=0.9)
        self.kernels = choose_kernels("auto", device).name
        self.pool, self.workers = open_folder(folder), workers
        self.order = Order(0, len(self.pool.ids), int(self.settings["batch_size"]), 2**40)
        self.form = Form(self.pool.image_size, MEAN, STD, device, AMP_DTYPES[amp])

    def _network(self, name: str) -> torch.nn.Module:
        return teachers.build(name, 10).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def batches(self, way: str) -> Iterator[Batch]:
        """Raises UsageError where the way is not there."""
        kind, size = str(self.settings["augment"]), self.form.size
        positions = torch.arange(len(self.pool.ids))
        choice = choose("auto", len(positions), size, self.form.device) if way == DEFAULT else STEP_WAYS[way]
        if choice.name == "dali" and not dali.installed():
            raise UsageError("dali", "NVIDIA DALI is not installed")
        source = open_source(choice, self.pool, positions, self.form, kind, self.order.batch_size, self.workers)
        found = source.batches(steps_of(self.order, kind, size, 0))
        if way != IN_MEMORY:
            return found
        one = next(found)
        return iter(lambda: one, None)

    def step(self, batch: Batch) -> None:
        assert batch.random is not None
        images = mix(batch.images, str(self.settings["mix"]), float(self.settings["mix_alpha"]), batch.random)
        with torch.autocast(self.device.type, AMP_DTYPES[self.amp], enabled=self.amp != "off"):
            with torch.no_grad():
                wanted = self.teacher(images)
            answers = self.student(images)
        temperature = float(self.settings["temperature"])
        loss = distillation_loss(answers, wanted, temperature, batch.labels, 0.0, self.kernels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def step_rows(work: Distillation, name: str, turns: int, count: int) -> list[dict[str, Any]]:
    """Milliseconds of a step with each source; slower: how much longer than on one batch in memory, of 1.

    The ratio is taken turn by turn, since neighbouring turns saw the same machine. A source that fails has an error.
    Raises RuntimeError where the step itself does.
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

    seconds, broken = in_turns({way: partial(some, way) for way in sources}, turns, work.device)
    failed |= broken
    if IN_MEMORY in failed:
        raise RuntimeError(f"{IN_MEMORY}: {failed[IN_MEMORY]}")
    rows: list[dict[str, Any]] = [{"step": name, "loader": way, "error": why} for way, why in failed.items()]
    for way in seconds:
        slower = [mine / base - 1 for base, mine in zip(seconds[IN_MEMORY], seconds[way], strict=True)]
        milliseconds = [1000 * spent / count for spent in seconds[way]]
        rows.append({"step": name, "loader": way, "milliseconds": spread(milliseconds), "slower": spread(slower)})
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The table of rates, and one of each training's steps."""
    lines = ["| images | loader | images/s: median (min to max) | ratio |", "|---|---|---|---|"]
    for row in result["rates"]:
        if "error" in row:
            lines.append(f"| {row['images']} | {row['way']} | failed: {row['error'][:60]} | - |")
            continue
        rate = row["images_per_second"]
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        numbers = f"{rate['median']:.0f} ({rate['min']:.0f} to {rate['max']:.0f})"
        lines.append(f"| {row['images']} | {row['way']} | {numbers} | {ratio} |")
    named = ""
    for row in result["steps"]:
        if row["step"] != named:
            named = row["step"]
            lines += ["", f"| {named} on batches of | ms: median (min to max) | slower |", "|---|---|---|"]
        if "error" in row:
            lines.append(f"| {row['loader']} | failed: {row['error'][:60]} | - |")
            continue
        ms, slower = row["milliseconds"], row["slower"]
        spread_ = "-" if row["loader"] == IN_MEMORY else f"{100 * slower['median']:.1f} %"
        lines.append(f"| {row['loader']} | {ms['median']:.1f} ({ms['min']:.1f} to {ms['max']:.1f}) | {spread_} |")
    machine = result["machine"]
    lines += [
        "",
        f"Batches of {result['batch']}, {result['workers']} workers; ratio: to DataLoader + PIL. {result['turns']} "
        f"turns, {machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}, "
        f"{machine['date']}: `python -m benchmarks.bench_loader`.",
    ]
    return "\n".join(lines)


def bench(
    sets: dict[str, tuple[int, str, int]],
    turns: int,
    count: int,
    workers: int,
    root: Path,
    device: torch.device,
    amp: str = "off",
) -> dict[str, Any]:
    """count: steps of a turn."""
    found = rates(root, sets, turns, workers, device)
    steps: list[dict[str, Any]] = []
    for number, training in enumerate(TRAININGS[device.type]):
        folder = make_folder(root / f"steps-{number}", 32, "png", training.images)
        name = training.name if amp == "off" else f"{training.name} in {amp}"
        steps += step_rows(Distillation(training, folder, workers, device, amp), name, turns, count)
    return {
        "rates": found,
        "steps": steps,
        "batch": BATCH,
        "workers": workers,
        "turns": turns,
        "machine": describe(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", choices=AMP_DTYPES, help="of the steps (default off on a CPU, bf16 on a GPU)")
    parser.add_argument("--turns", type=int, default=7, help="of every way (default 7)")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads that decode (default 2)")
    parser.add_argument("--quick", action="store_true", help="few images and one turn: to see that it works")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/loader-<cpu or device>.json")
    a = parser.parse_args()
    if a.record and a.quick:
        parser.error("a rehearsal is not recorded")
    try:
        device = resolve_device(a.device)
    except UsageError as error:
        sys.exit(f"error: {error}")
    amp = a.amp or ("off" if device.type == "cpu" else "bf16")
    sets = {name: (*rest, 140 if a.quick else count) for name, (*rest, count) in SETS.items()}
    turns, count = (1, 1) if a.quick else (a.turns, STEPS[device.type])
    with tempfile.TemporaryDirectory() as root:
        result = bench(sets, turns, count, a.workers, Path(root), device, amp)  # type: ignore[arg-type]
    print(markdown(result), file=sys.stderr)
    if a.record:
        kind = "cpu" if device.type == "cpu" else name_of(result["machine"])
        replace_text(RESULTS / f"loader-{kind}.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
