"""What a synthesis costs: predicted, measured, and for 50 000 images on this machine and on GPUs that are not here.

    python -m benchmarks.cost_model --teacher runs/demo/teacher          about ten minutes on two cores
    python -m benchmarks.cost_model --cases demo,demo-unet               some of CASES; recorded, the others stay

Predictions are those of `dfkd-generate --plan-only`, which counts FLOP and bytes operation by operation
(engine/work.py) and tries every network call (dfkd/planning/seconds.py); each is taken just before the run that it is
compared with. A run's seconds are those of sampling and writing, from its result.json; starting the process is stated
apart. The ceilings of this machine are a float32 matmul and a copy.

50 000 images of Stable Diffusion 1.5 (512x512, float16, random weights) are counted and never run: on GPUs by their
data sheets (`--plan-for`), here from one image a call.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import sd15
from benchmarks.flops import in_turns, matmuls
from benchmarks.guidance_paths import ROWS, flags
from benchmarks.machine import describe, name_of
from benchmarks.quality import call
from benchmarks.reduced_sd import write_pipeline
from benchmarks.sd15_sampling import ROWS as SD15_ROWS
from benchmarks.sd15_sampling import synthesis as sd15_synthesis
from dfkd.cli.generate_options import GenerateOptions
from dfkd.files import replace_text
from dfkd.synthesis.planning.data_sheets import SHEETS
from dfkd.synthesis.planning.elsewhere import predict_elsewhere
from dfkd.synthesis.planning.plan import make_plan
from dfkd.synthesis.planning.seconds import predict, total
from dfkd.synthesis.planning.words import duration
from dfkd_engine.store import EngineStore

RESULTS = Path(__file__).parent / "results"
MANY = 50_000
GPU, COUNTS = "H100", (1, 8)
STEPS = 50  # of Stable Diffusion
REHEARSED = ("published", "late")
COPY_BYTES = 2**29


@dataclass(frozen=True)
class Case:
    """words: of dfkd-generate beside --preset demo. reduced: image size of a reduced Stable Diffusion; 0: the demo's
    prior.
    """

    words: str
    reduced: int = 0


_SD = "--group 16 --batch 16 --shard-size 16 --count 32 --steps 10 --refine-steps 0 --guidance-repeats 1"
_ALWAYS = "--guide-from 0 --cfg-to 1"
CASES: Mapping[str, Case] = {
    "demo": Case(""),
    "demo-unguided": Case("--guidance-step 0"),
    "demo-unet": Case("--gradient unet"),
    "demo-published": Case(" ".join(flags(ROWS["published"]))),
    "demo-64": Case("--size 64 --count 200"),
    "reduced-sd-late": Case(_SD, 128),
    "reduced-sd-latent": Case(f"{_SD} {_ALWAYS}", 128),
    "reduced-sd-unet": Case(f"{_SD} {_ALWAYS} --gradient unet", 64),
}


def ceilings(device: torch.device, turns: int = 5) -> dict[str, float]:
    """FLOP/s of a float32 matmul and bytes/s of a copy, here."""
    matmul, flop = matmuls(device, torch.float32)["float32"]
    source = torch.empty(COPY_BYTES // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds, _ = in_turns({"matmul": matmul, "copy": lambda: target.copy_(source)}, turns, device)
    return {"flops": flop / median(seconds["matmul"]), "bytes_per_second": COPY_BYTES / median(seconds["copy"])}


def prior_of(case: Case, folder: Path, thin: bool) -> list[object]:
    """The words that name its prior, written to the folder where it is not there yet; none for the embedded one."""
    if not case.reduced:
        return []
    path = folder / f"reduced-{case.reduced}"
    if not path.exists():
        write_pipeline(path, case.reduced, *((sd15.THIN["unet"], sd15.THIN["vae"]) if thin else ()))
    return ["--prior", path]


def measured(case: Case, given: list[object], scratch: Path, repeats: int) -> dict[str, Any]:
    """A prediction and a run, in turns; the work of an image and the trial's seconds are the last turn's.

    given: words of dfkd-generate beside the case's own.
    """
    words = ["--preset", "demo", *case.words.split(), *given]
    predicted, spent, starts = [], [], []
    plan: dict[str, Any] = {}
    for turn in range(repeats):
        out = scratch / f"run-{time.monotonic_ns()}-{turn}"
        plan = call("dfkd-generate", *words, "--out", out, "--plan-only")["plan"]
        started = time.perf_counter()
        result = call("dfkd-generate", *words, "--out", out)
        starts.append(time.perf_counter() - started - result["seconds"])
        predicted.append(plan["predicted_seconds"])
        spent.append(result["seconds"])
    return {
        "commit": describe(torch.device("cpu"))["commit"],
        "images": plan["images"],
        "predicted_seconds": predicted,
        "seconds": spent,
        "start_seconds": starts,
        "error": median(p / s - 1 for p, s in zip(predicted, spent, strict=True)),
        "group": plan["group"],
        "timings": plan["timings"],
        "work": plan["work"],
    }


def shares(row: Mapping[str, Any], here: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """By network, of an image: FLOP, bytes, milliseconds of the trial, and the share of the ceilings' FLOP/s."""
    found = {}
    for name, work in row["work"].items():
        timing = row["timings"][name]
        seconds = timing["seconds"] * timing["calls_per_group"] / row["group"]
        found[name] = {**work, "milliseconds": 1000 * seconds, "of_matmul": work["flop"] / seconds / here["flops"]}
    return found


def stable_diffusion(size: int, thin: bool, device: torch.device, modes: Sequence[str]) -> list[dict[str, Any]]:
    """50 000 images of each of `modes`: FLOP of one, seconds on GPUs from and to, and on the device."""
    sources = sd15.make_sources(size, thin)
    rows = []
    for mode in modes:
        settings, group = SD15_ROWS[mode], 1 if mode == "published" else 16
        options = GenerateOptions(
            out=Path(), group=group, batch=group, dtype="fp16", steps=STEPS, gradient=settings.gradient,
            bn_stats="image" if mode == "published" else "group",
        )  # fmt: skip
        own = sd15_synthesis(mode, sources, group, STEPS, "torch")
        row: dict[str, Any] = {"mode": mode, "gpus": {}}
        one = predict_elsewhere(options, own, 1, SHEETS[GPU])
        row["flop_per_image"] = sum(part.flop for part in one.work.values()) / group
        for count in COUNTS:
            found = replace(one, devices=count)
            floor, seconds = found.floor(MANY, fused=True), found.predicted(MANY)
            row["gpus"][f"{count} {GPU}"] = {"floor_seconds": floor, "seconds": seconds}
        rows.append(row)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    sources = sd15.placed(sources, device, dtype)
    for row in rows:
        mode = row["mode"]
        if SD15_ROWS[mode].gradient == "unet":  # its gradient needs more memory than a small machine has
            continue
        options = GenerateOptions(out=Path(), group=16, batch=16, dtype="fp32" if device.type == "cpu" else "fp16")
        own = sd15_synthesis(mode, sources, 16, STEPS, "torch")
        timings = predict(own, make_plan(options, own, {}), (), EngineStore(Path("build/engines")))
        row["here_seconds"] = total(timings, -(-MANY // 16))
    return rows


def updated(record: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the cases of the result. Raises SystemExit: they are of two machines."""
    there, here = (each["machine"]["device"] for each in (record, result))
    if there != here:
        sys.exit(f"error: {there} is on record, and this is {here}: record all cases")
    return {**record, "cases": {**record["cases"], **result["cases"]}}


def markdown(result: dict[str, Any]) -> str:
    """The tables: predicted beside measured, parts of the first case, and 50 000 images."""
    here, machine = result["ceilings"], result["machine"]
    lines = ["| run | images | predicted s | measured s | error | 50 000 images here |", "|" + "---|" * 6]
    for name, row in result["cases"].items():
        many = duration(median(row["seconds"]) * MANY / row["images"])
        cells = [name, row["images"], _spread(row["predicted_seconds"]), _spread(row["seconds"])]
        lines.append("| " + " | ".join(map(str, [*cells, f"{100 * row['error']:+.0f} %", many])) + " |")
    lines += ["", "| run | network | GFLOP an image | GB an image | ms an image | of matmul |", "|" + "---|" * 6]
    for name, row in result["cases"].items():
        for network, part in shares(row, here).items():
            cells = [name, network, f"{part['flop'] / 1e9:.3g}", f"{part['bytes'] / 1e9:.3g}"]
            cells += [f"{part['milliseconds']:.3g}", f"{100 * part['of_matmul']:.0f} %"]
            lines.append("| " + " | ".join(cells) + " |")
    if result["stable_diffusion"]:
        names_of = result["stable_diffusion"][0]["gpus"]
        heads = [f"{text} {gpu}" for gpu in names_of for text in ("no less than, on", "forecast for")]
        lines += ["", f"| SD-1.5, {STEPS} steps | TFLOP an image | " + " | ".join([*heads, "here"]) + " |"]
        lines.append("|" + "---|" * (3 + len(heads)))
    for row in result["stable_diffusion"]:
        cells = [row["mode"], f"{row['flop_per_image'] / 1e12:.3g}"]
        for gpu in row["gpus"].values():
            cells += [duration(gpu["floor_seconds"]), " to ".join(map(duration, gpu["seconds"]))]
        cells.append(duration(row["here_seconds"]) if "here_seconds" in row else "-")
        lines.append("| " + " | ".join(cells) + " |")
    gpus = f" GPUs: 50 000 images of {result['size']}x{result['size']} by data sheet, not measured."
    starts = median(start for row in result["cases"].values() for start in row["start_seconds"])
    lines += [
        "",
        f"Error: predicted over measured, median of {result['repeats']} turns; a process starts in {starts:.0f} s"
        f" beside that. Ceilings here: {here['flops'] / 1e9:.0f} GFLOP/s, {here['bytes_per_second'] / 1e9:.1f} GB/s."
        f"{gpus if result['stable_diffusion'] else ''} {machine['device']}, "
        f"{machine['threads']} threads, torch {machine['versions']['torch']}, {machine['date']}: "
        "`python -m benchmarks.cost_model`.",
    ]
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def names(text: str) -> list[str]:
    found = text.split(",")
    if unknown := [name for name in found if name not in CASES]:
        raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; known are {', '.join(CASES)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="folder of dfkd-train-teacher; trained here when absent")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", type=names, default=list(CASES), help=f"of {', '.join(CASES)} (default all)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default 3)")
    parser.add_argument("--generate", default="", help="more options of dfkd-generate, as one string")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/cost-model-<device>.json")
    parser.add_argument("--rehearse", action="store_true", help="small Stable Diffusion, a teacher of one epoch")
    a = parser.parse_args()
    if a.record and a.rehearse:
        parser.error("a rehearsal is not recorded")
    size, device = 64 if a.rehearse else 512, torch.device(a.device)
    result: dict[str, Any] = {"machine": describe(device), "repeats": a.repeats, "size": size}
    path = RESULTS / f"cost-model-{'cpu' if device.type == 'cpu' else name_of(result['machine'])}.json"
    record = None
    if a.record and a.cases != list(CASES):
        if not path.exists():
            parser.error(f"{path.name} is not there: record all cases first")
        record = updated(json.loads(path.read_text()), {**result, "cases": {}})
    result["ceilings"] = ceilings(device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if a.teacher is None:
            a.teacher = folder / "teacher"
            quick = ["--epochs", 1] if a.rehearse else []
            call("dfkd-train-teacher", "--preset", "demo", "--out", a.teacher, *quick)
        more = ["--teacher-checkpoint", a.teacher, "--device", a.device, "--engines", folder / "engines"]
        more += a.generate.split()
        given = {name: [*prior_of(CASES[name], folder, a.rehearse), *more] for name in a.cases}
        result["cases"] = {name: measured(CASES[name], given[name], folder, a.repeats) for name in a.cases}
    everything = a.cases == list(CASES) or a.rehearse  # it takes minutes, and has nothing to do with single cases
    modes = REHEARSED if a.rehearse else tuple(SD15_ROWS)
    result["stable_diffusion"] = stable_diffusion(size, a.rehearse, device, modes) if everything else []
    if record:
        result = updated(record, result)
    print(markdown(result), file=sys.stderr)
    if a.record:
        replace_text(path, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
