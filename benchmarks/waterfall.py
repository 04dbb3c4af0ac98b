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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks.flops import in_turns
from benchmarks.guidance_paths import ROWS, cosine, gradient_at, options_of, student_accuracy, unguided
from benchmarks.machine import describe, name_of
from benchmarks.published_loop import PublishedLoop
from benchmarks.quality import call
from benchmarks.waterfall_table import markdown, plot, products
from dfkd.cli.generate import build_command, quieten_libraries
from dfkd.cli.generate_options import GenerateOptions
from dfkd.cli.prepare import prepare
from dfkd.engines.choose import apply, choose, in_words
from dfkd.engines.requests import gradient_rows, rows_per_call
from dfkd.engines.sources import sources_of
from dfkd.files import replace_file, replace_text
from dfkd.kernel_choice import choose_kernels
from dfkd.shards import Record, ShardFolder, open_folder
from dfkd.synthesis.prompts import labels_of, prompt_of
from dfkd.synthesis.run import Rows, Synthesis, synthesise
from dfkd.synthesis.sampler import INITIAL_NOISE
from engine.store import EngineStore
from kernels.philox import philox_normal

RESULTS = Path(__file__).parent / "results"
START, FIXED, ALGORITHM = "start", "fixed", "algorithm"
BACKENDS = {"cpu": "inductor,onnxruntime", "cuda": "inductor"}
REHEARSAL = ("--group", "8", "--batch", "8", "--shard-size", "8", "--steps", "3")


@dataclass(frozen=True)
class Technique:
    """What a row adds to the one before.

    takes    options in which the row leaves the published settings for the preset's
    single   one image at a time; nchw: weights in the order of NCHW; kernels, engines: as `dfkd-generate` chooses
             them, eager networks and PyTorch without
    """

    name: str
    kind: str
    what: str
    takes: tuple[str, ...] = ()
    single: bool = False
    nchw: bool = False
    kernels: bool = False
    engines: bool = False


PUBLISHED = Technique("published", START, "`benchmarks/published_loop.py`", single=True, nchw=True)
TECHNIQUES = (
    PUBLISHED,
    Technique("our sampler", FIXED, "the same by dfkd's sampler", single=True, nchw=True),
    Technique("groups", FIXED, "a group of images a network call, each with its own statistics", nchw=True),
    Technique("channels_last", FIXED, "weights in the order of NHWC"),
    Technique("clean latent", ALGORITHM, "the gradient stops at the clean latent: one UNet call a step", ("gradient",)),
    Technique("early cfg", ALGORITHM, "classifier-free guidance in the first steps alone", ("cfg_to",)),
    Technique("late guidance", ALGORITHM, "the teacher guides in the last steps alone", ("guide_from",)),
    Technique("group statistics", ALGORITHM, "BatchNorm statistics of a group of mixed classes", ("bn_stats",)),
    Technique("repeats", ALGORITHM, "several guidance steps at a noise level", ("guidance_repeats",)),
    Technique("refinement", ALGORITHM, "guidance steps on the finished pixels", ("refine_steps",)),
    Technique("fused kernels", FIXED, "what a step is beside the networks, in Triton", kernels=True),
    Technique("engines", FIXED, "the networks compiled, by `--backend auto`", kernels=True, engines=True),
)


def overrides(technique: Technique) -> dict[str, Any]:
    """The options of a row that are not the preset's."""
    until = TECHNIQUES[: TECHNIQUES.index(technique) + 1]
    taken = {option for one in until for option in one.takes}
    return {name: value for name, value in ROWS["published"].items() if name not in taken}


def techniques(device: torch.device) -> list[Technique]:
    """The rows of a device: without Triton's where `dfkd-generate` would not take it."""
    fused = choose_kernels("auto", device).name == "triton"
    return [one for one in TECHNIQUES if fused or not (one.kernels and not one.engines)]


@dataclass(frozen=True)
class Way:
    """A row made ready.

    run(folder)   writes the images 0 to `images` - 1 into a new folder, as shards
    synthesis     its settings and networks; of the published loop, those of our sampler's row
    how           which engines were taken, for people
    """

    run: Callable[[Path], object]
    images: int
    synthesis: Synthesis
    how: tuple[str, ...] = ()


def way(technique: Technique, options: GenerateOptions, singles: int, engines: Path) -> Way:
    """Load the row's networks, and its engines where it has them."""
    kernels = choose_kernels("auto" if technique.kernels else "torch", torch.device(options.device)).name
    synthesis, how = prepare(options, kernels), ()
    rows, images = Rows(rows_per_call(options), rows_per_call(options), gradient_rows(options)), options.group
    if technique.nchw:
        for network in (synthesis.prior.unet, synthesis.prior.vae, synthesis.teacher.module):
            network.to(memory_format=torch.contiguous_format)
    if technique.engines:
        store = EngineStore(engines)
        choices = choose(options, store, build_command(options))
        synthesis, how = apply(synthesis, sources_of(synthesis), choices, store), tuple(in_words(choices))
    if technique.single:
        rows, images, synthesis = Rows(1, 1, 1), singles, replace(synthesis, group=1)
    if technique is PUBLISHED:
        return Way(partial(write_published, PublishedLoop.of(synthesis), synthesis, images), images, synthesis)
    return Way(partial(write, synthesis, rows, images), images, synthesis, how)


def shards(path: Path, synthesis: Synthesis, images: int) -> ShardFolder:
    """A new folder of one shard."""
    size = synthesis.latent_size[0] * synthesis.prior.vae_scale_factor
    return ShardFolder.create_or_open(path, {}, synthesis.teacher.class_names, size, "png", images, images)


def write(synthesis: Synthesis, rows: Rows, images: int, path: Path) -> None:
    with shards(path, synthesis, images) as folder:
        synthesise(folder, synthesis, rows, lambda _: None)


def write_published(loop: PublishedLoop, synthesis: Synthesis, images: int, path: Path) -> None:
    """The same images by the published loop, one after another, written as a shard like those of every row."""
    prior, shape = synthesis.prior, (synthesis.prior.latent_channels, *synthesis.latent_size)
    pixels, records = [], []
    for index in range(images):
        ids = torch.tensor([index])
        label = int(labels_of(ids, synthesis.classes))
        name = synthesis.teacher.class_names[label]
        prompt = prompt_of(synthesis.prompt, name)
        noise = philox_normal(synthesis.seed, ids.to(synthesis.device), INITIAL_NOISE, shape)
        embeddings = prior.encode_prompts([prompt]), prior.encode_prompts([synthesis.negative_prompt])
        image = loop(noise.to(prior.dtype), label, *embeddings)
        pixels.append((image * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
        records.append(Record(index, label, name, synthesis.seed, prompt))
    with shards(path, synthesis, images) as folder:
        folder.write(0, torch.cat(pixels).contiguous().numpy(), records)


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
