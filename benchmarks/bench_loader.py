"""Loaders: images a second beside what others read the same shards with, and what a loader costs a distillation step.

python -m benchmarks.bench_loader              --quick for a rehearsal; --record writes benchmarks/results

rates   32x32 PNG, 32x32 npy and 224x224 JPEG in shards: our three sources beside torch's DataLoader with PIL,
        webdataset and Hugging Face datasets, all to cropped, flipped, normalised float32 batches, in turns. A turn
        is an epoch; a way's first epoch is not counted. `resident` has decoded everything before it begins.
steps   the demo's distillation step (networks, batch, views and mixtures of its preset) on batches of each source,
        beside the same step on one batch that is already there, in turns.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.flops import in_turns, reason
from benchmarks.loader_ways import MEAN, OTHERS, OURS, STD, epoch_of
from benchmarks.machine import describe
from dfkd import teachers
from dfkd.distillation.losses import distillation_loss
from dfkd.distillation.mixing import mix
from dfkd.files import replace_text
from dfkd.loader import Batch, Form, LoaderChoice, Order, choose, dali, open_source
from dfkd.loader import steps as steps_of
from dfkd.presets import PRESETS
from dfkd.shards import Record, ShardFolder, open_folder

CPU = torch.device("cpu")
RESULT = Path(__file__).parent / "results" / "loader-cpu.json"
# Name: side, format, images.
SETS = {"32 png": (32, "png", 4000), "32 npy": (32, "npy", 4000), "224 jpg": (224, "jpg", 600)}
BATCH, SHARDS, STEPS = 128, 4, 30
IN_MEMORY, DEFAULT = "one batch in memory", "the default loader"
STEP_WAYS = {
    IN_MEMORY: LoaderChoice("resident", ""),
    "dali, decoding": LoaderChoice("dali", ""),
    "dali, decoded once": LoaderChoice("dali", "", kept=True),
    "resident": LoaderChoice("resident", ""),
    "torch": LoaderChoice("torch", ""),
}


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


def rates(root: Path, sets: dict[str, tuple[int, str, int]], turns: int, workers: int) -> list[dict[str, Any]]:
    """A row for each set of images and way of reading it; a way that is not there has an error for its rates."""
    rows = []
    for name, (size, image_format, count) in sets.items():
        folder = make_folder(root / name.replace(" ", "-"), size, image_format, count)
        calls: dict[str, Callable[[], int]] = {}
        for way in (*OTHERS, *OURS):
            try:
                epoch = epoch_of(way, folder, BATCH, workers)
                calls[way] = lambda epoch=epoch: sum(len(images) for images in epoch())  # type: ignore[misc]
                seen = calls[way]()
                if seen != count:
                    raise RuntimeError(f"{seen} of {count} images came")
            except Exception as error:  # of other people's packages: anything, and the others are still of interest
                calls.pop(way, None)
                rows.append({"images": name, "way": way, "error": reason(error)})
        seconds, failed = in_turns(calls, turns, CPU)
        rows += [{"images": name, "way": way, "error": why} for way, why in failed.items()]
        found = {way: [count / spent for spent in values] for way, values in seconds.items()}
        base = statistics.median(found["DataLoader + PIL"]) if "DataLoader + PIL" in found else None
        for way, values in found.items():
            ratio = statistics.median(values) / base if base else None
            rows.append({"images": name, "way": way, "images_per_second": spread(values), "ratio": ratio})
    return rows


class Distillation:
    """The demo's step on batches of any source."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.preset = {"mix_alpha": 1.0, **PRESETS["demo"].distill}
        torch.manual_seed(0)
        name = str(PRESETS["demo"].train_teacher["architecture"])
        self.teacher = teachers.build(name, 10).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.student = teachers.build(str(self.preset["student"]), 10).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-3, momentum=0.9)
        self.pool, self.workers = open_folder(folder), workers
        self.order = Order(0, len(self.pool.ids), int(self.preset["batch_size"]), 2**40)
        self.form = Form(self.pool.image_size, MEAN, STD, CPU)

    def batches(self, way: str) -> Iterator[Batch]:
        kind, size = str(self.preset["augment"]), self.form.size
        positions = torch.arange(len(self.pool.ids))
        choice = choose("auto", len(positions), size, self.form.device) if way == DEFAULT else STEP_WAYS[way]
        source = open_source(choice, self.pool, positions, self.form, kind, self.order.batch_size, self.workers)
        found = source.batches(steps_of(self.order, kind, size, 0))
        if way != IN_MEMORY:
            return found
        one = next(found)
        return iter(lambda: one, None)

    def step(self, batch: Batch) -> None:
        assert batch.random is not None
        images = mix(batch.images, str(self.preset["mix"]), float(self.preset["mix_alpha"]), batch.random)
        with torch.no_grad():
            wanted = self.teacher(images)
        temperature = float(self.preset["temperature"])
        loss = distillation_loss(self.student(images), wanted, temperature, batch.labels, 0.0, "torch")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def step_rows(folder: Path, turns: int, count: int, workers: int) -> list[dict[str, Any]]:
    """Milliseconds of a step with each source; slower: how much longer than on one batch in memory, of 1.

    The ratio is taken turn by turn, since neighbouring turns saw the same machine.
    """
    work = Distillation(folder, workers)
    ways = [way for way in (*STEP_WAYS, DEFAULT) if "dali" not in way or dali.installed()]
    sources = {way: work.batches(way) for way in ways}

    def some(way: str) -> None:
        for _ in range(count):
            work.step(next(sources[way]))

    seconds, failed = in_turns({way: partial(some, way) for way in ways}, turns, CPU)
    if failed:
        raise RuntimeError(f"{next(iter(failed))}: {failed[next(iter(failed))]}")
    rows = []
    for way in ways:
        slower = [mine / base - 1 for base, mine in zip(seconds[IN_MEMORY], seconds[way], strict=True)]
        milliseconds = [1000 * spent / count for spent in seconds[way]]
        rows.append({"loader": way, "milliseconds": spread(milliseconds), "slower": spread(slower)})
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Both tables."""
    lines = ["| images | loader | images/s: median (min to max) | ratio |", "|---|---|---|---|"]
    for row in result["rates"]:
        if "error" in row:
            lines.append(f"| {row['images']} | {row['way']} | failed: {row['error'][:60]} | - |")
            continue
        rate = row["images_per_second"]
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        numbers = f"{rate['median']:.0f} ({rate['min']:.0f} to {rate['max']:.0f})"
        lines.append(f"| {row['images']} | {row['way']} | {numbers} | {ratio} |")
    lines += ["", "| the demo's step on batches of | ms: median (min to max) | slower |", "|---|---|---|"]
    for row in result["steps"]:
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


def bench(sets: dict[str, tuple[int, str, int]], turns: int, count: int, workers: int, root: Path) -> dict[str, Any]:
    return {
        "rates": rates(root, sets, turns, workers),
        "steps": step_rows(make_folder(root / "steps", 32, "png", 400), turns, count, workers),
        "batch": BATCH,
        "workers": workers,
        "turns": turns,
        "machine": describe(CPU),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="of every way (default 7)")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads that decode (default 2)")
    parser.add_argument("--quick", action="store_true", help="few images and two turns: to see that it works")
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.name}")
    a = parser.parse_args()
    sets = {name: (*rest, 260 if a.quick else count) for name, (*rest, count) in SETS.items()}
    with tempfile.TemporaryDirectory() as root:
        result = bench(sets, 2 if a.quick else a.turns, 5 if a.quick else STEPS, a.workers, Path(root))  # type: ignore[arg-type]
    print(markdown(result), file=sys.stderr)
    if a.record:
        replace_text(RESULT, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
