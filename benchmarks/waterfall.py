"""From the published loop to `dfkd-generate --preset demo` on engines, one technique a row: images per second, what the
technique changes in the images, and what they are worth.

    python -m benchmarks.waterfall --teacher runs/demo/teacher              speeds, and the engines built before them
    python -m benchmarks.waterfall --teacher runs/demo/teacher --students   also a student per row of other images
    python -m benchmarks.waterfall --out runs/waterfall --students          the same, and what was made is kept

Every row is the one before it and one technique more; the first is benchmarks/published_loop.py, and the last has no
setting left that is not the preset's. A row is

fixed       the same images but for rounding, which guidance of unit length amplifies: the mean absolute difference to
            the images of the row before stands beside it, of 255
algorithm   other images: beside the speed stand the cosine of the row's gradient with the published one at the same
            latents, mean over the steps in which the row guides, and the accuracy of a student

Speed is end to end, sampled and written in shards; networks are loaded and engines built before. All rows run in turns
in one process, those of one image at a time with --singles images a turn, the others with a group. A row's gain is its
median over that of the row before, so that gains multiply to the last row over the first.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks.flops import in_turns
from benchmarks.guidance_paths import cosine, gradient_at, options_of, student_accuracy, unguided
from benchmarks.machine import describe, name_of
from benchmarks.quality import call
from benchmarks.waterfall_rows import ALGORITHM, FIXED, Technique, Way, overrides, techniques, way
from benchmarks.waterfall_table import markdown, plot, products
from dfkd.cli.generate import quieten_libraries
from dfkd.files import replace_file, replace_text
from dfkd.data.shards import open_folder
from dfkd.synthesis.run import Synthesis

RESULTS = Path(__file__).parent / "results"
BACKENDS = {"cpu": "inductor,onnxruntime", "cuda": "inductor"}
REHEARSAL = ("--group", "8", "--batch", "8", "--shard-size", "8", "--steps", "3")


def measure(ways: Mapping[str, Way], folder: Path, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds an image of every row, one a turn. The last turn's images of row NAME stay in folder/NAME/last.

    Raises SystemExit naming a row that cannot be run: the rows after it would be gains over nothing.
    """
    numbers = itertools.count()

    def run(name: str) -> None:
        path = folder / name / str(next(numbers))
        path.parent.mkdir(exist_ok=True)
        ways[name].run(path)
        last = path.with_name("last")
        last.unlink(missing_ok=True)
        last.symlink_to(path)

    found, failed = in_turns({name: partial(run, name) for name in ways}, repeats, device)
    if failed:
        sys.exit("error: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))
    return {name: [spent / ways[name].images for spent in found[name]] for name in ways}


def difference(one: Path, other: Path) -> float:
    """Mean absolute difference, of 255, of the images that two folders have in common."""
    first, second = open_folder(one), open_folder(other)
    both = torch.arange(min(len(first.ids), len(second.ids)))
    return (first.read(both).float() - second.read(both).float()).abs().mean().item()


def cosines(rows: Mapping[str, Synthesis], published: Synthesis) -> dict[str, float]:
    """Of every row's gradient with the published one, mean over images and over the steps in which the row guides.

    Both are taken at the same latents, along an unguided trajectory of a whole group.
    """
    points, steps, micro = unguided(published, published.group), len(published.table), published.group
    found: dict[str, list[float]] = {name: [] for name in rows}
    for i, z in enumerate(points):
        guiding = [name for name, row in rows.items() if row.settings.guided(i, steps)]
        if not guiding:
            continue
        there = gradient_at(published, z, i, published.settings.classifier_free(i, steps), micro)
        for name in guiding:
            with_cfg = rows[name].settings.classifier_free(i, steps)
            found[name].append(cosine(gradient_at(rows[name], z, i, with_cfg, micro), there))
    return {name: mean(values) for name, values in found.items()}


def build_engines(options: Sequence[str], backends: Sequence[str], engines: Path) -> dict[str, Any]:
    """Build what the folder lacks; seconds of it, and how many engines were built and were there."""
    started, counts = time.perf_counter(), {"built": 0, "current": 0}
    for backend in backends:
        made = call("dfkd-engines", "build", "--backend", backend, "--engines", engines, "--", *options)
        counts = {name: count + made[name] for name, count in counts.items()}
    return {"seconds": round(time.perf_counter() - started, 1), "backends": list(backends), **counts}


def table_rows(
    ways: Mapping[str, Way], rows: Sequence[Technique], seconds: Mapping[str, list[float]], folder: Path
) -> list[dict[str, Any]]:
    """The rows as plain JSON values, without cosine and accuracy."""
    found: list[dict[str, Any]] = []
    for number, technique in enumerate(rows):
        name, before = technique.name, rows[number - 1].name if number else None
        spent = seconds[name]
        row: dict[str, Any] = {
            "name": name,
            "kind": technique.kind,
            "what": technique.what,
            "images_at_a_time": 1 if technique.single else ways[name].images,
            "images_a_turn": ways[name].images,
            "images_per_second": 1 / median(spent),
            "slowest": 1 / max(spent),
            "fastest": 1 / min(spent),
            "seconds_per_image": spent,
            "networks": list(ways[name].how),
        }
        if before:
            gains = [p / s for p, s in zip(seconds[before], spent, strict=True)]
            row |= {"gain": median(seconds[before]) / median(spent), "gain_low": min(gains), "gain_high": max(gains)}
        if technique.kind == FIXED and before:
            row["pixel_difference"] = difference(folder / before / "last", folder / name / "last")
        found.append(row)
    return found


def accuracies(rows: Sequence[Technique], of: Callable[[Technique], float]) -> list[tuple[float, str]]:
    """Accuracy of every row's student and the row that made its images: of fixed rows, the row that theirs equal."""
    found: list[tuple[float, str]] = []
    for technique in rows:
        found.append(found[-1] if technique.kind == FIXED else (of(technique), technique.name))
    return found


def student(technique: Technique, a: argparse.Namespace, out: Path) -> float:
    """The published row's student too learns from images that our sampler made in groups: they are the same."""
    chosen = {"device": a.device, "backend": "eager", **overrides(technique)}
    return student_accuracy(a.teacher, out / "students" / technique.name.replace(" ", "-"), chosen, a.seed, a.split)


def run(a: argparse.Namespace, out: Path, scratch: Path) -> dict[str, Any]:
    """out: of teacher, engines and students, which are taken up where they are there; scratch: of what is timed."""
    device = torch.device(a.device)
    machine = describe(device)  # before the work: what fails here must not lose it
    if a.teacher is None:
        a.teacher = out / "teacher"
        quick = ["--epochs", 1] if a.rehearse else []
        call("dfkd-train-teacher", "--preset", "demo", "--out", a.teacher, "--seed", a.seed, *quick)
    more = ["--seed", str(a.seed), *(REHEARSAL if a.rehearse else ())]
    engines = a.engines or out / "engines"
    given = ["--preset", "demo", "--teacher-checkpoint", a.teacher, "--device", a.device, *more]
    built = build_engines(given, [name for name in a.backends.split(",") if name], engines)
    rows = techniques(device)
    options = {one.name: options_of(a.teacher, a.device, scratch, overrides(one), more) for one in rows}
    ways = {one.name: way(one, options[one.name], a.singles, engines) for one in rows}
    seconds = measure(ways, scratch, a.repeats, device)
    found = table_rows(ways, rows, seconds, scratch)
    published = ways["channels_last"].synthesis
    guides = cosines({o.name: ways[o.name].synthesis for o in rows if o.kind == ALGORITHM}, published)
    learned = accuracies(rows, partial(student, a=a, out=out)) if a.students else [(None, None)] * len(rows)
    for row, (accuracy, of) in zip(found, learned, strict=True):
        row |= {"gradient_cosine": guides.get(row["name"]), "student_accuracy": accuracy, "student_of": of}
    result = {"machine": machine, "turns": a.repeats, "steps": len(published.table), "engines": built, "rows": found}
    return result | {"products": products(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="folder of dfkd-train-teacher (default OUT/teacher)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--singles", type=int, default=4, help="images a turn where they come one by one (default 4)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default 5)")
    parser.add_argument("--out", type=Path, help="folder of teacher, engines and students, to take them up again")
    parser.add_argument("--engines", type=Path, help="folder of the engines (default OUT/engines)")
    parser.add_argument("--backends", help="of the engines to build, comma-separated; '' builds none (default " +
                        ", ".join(f"{names} on {kind}" for kind, names in BACKENDS.items()) + ")")  # fmt: skip
    parser.add_argument("--students", action="store_true", help="also distil a student per row of other images")
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="real images for the students")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/waterfall-<device>.json, .png")
    parser.add_argument("--rehearse", action="store_true", help="a teacher of one epoch, groups of 8, no engines")
    a = parser.parse_args()
    if a.rehearse and (a.record or a.students):
        parser.error("a rehearsal is not recorded, and has no students")
    if a.backends is None:
        a.backends = "" if a.rehearse else BACKENDS[a.device]
    quieten_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        result = run(a, a.out or Path(scratch) / "out", Path(scratch))
    print(markdown(result), file=sys.stderr)
    if a.record:
        stem = RESULTS / f"waterfall-{'cpu' if a.device == 'cpu' else name_of(result['machine'])}"
        RESULTS.mkdir(exist_ok=True)
        replace_text(stem.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
        replace_file(stem.with_suffix(".png"), partial(plot, result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
