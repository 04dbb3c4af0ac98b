"""What mSARC is worth on the demo: students of the same guided images with and without it, over seeds.

    python -m benchmarks.msarc --record

Teacher and images of a seed are made once, or taken from the folder where they are (`python -m benchmarks.quality demo`
leaves them in runs/quality/seed-N). A step with mSARC takes longer; so beside equal steps stands a student without it
that may train for as long as the slowest student with it did. The published balance of the two losses is a weight of
the number of classes, 10; with the preset's rate of 0.2 that run diverged (seed 0), so smaller ones are the default.
"""

import argparse
import json
import shlex
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.quality import Run
from dfkd.files import replace_text
from dfkd.presets import PRESETS

RESULT = Path(__file__).parent / "results" / "msarc-cpu.json"
STEPS = int(str(PRESETS["demo"].distill["steps"]))


def students(run: Run, weights: list[float], steps: int) -> list[dict[str, Any]]:
    """Rows of one seed: {name, weight, steps, accuracy, seconds}, seconds of training."""
    data, rows = run.folder / "synthetic", []

    def add(name: str, weight: float, length: int) -> None:
        options = ["--steps", length, *(["--msarc-weight", weight] if weight else [])]
        made = run.distilled(name, data, run.folder / "msarc" / f"{name.replace(' ', '-')}-{length}", *options)
        rows.append({"name": name, "weight": weight, "steps": length} | {k: made[k] for k in ("accuracy", "seconds")})

    add("without", 0.0, steps)
    for weight in weights:
        add(f"weight {weight:g}", weight, steps)
    slowest = max(row["seconds"] for row in rows)
    add("without, equal seconds", 0.0, max(steps, round(steps * slowest / rows[0]["seconds"])))
    return rows


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    weights = [float(weight) for weight in arguments.weights.split(",")]
    seeds = list(range(arguments.first_seed, arguments.first_seed + arguments.seeds))
    found, teachers = [], []
    for seed in seeds:
        more = shlex.split(arguments.generate), shlex.split(arguments.distill)
        run = Run(arguments.out / f"seed-{seed}", seed, arguments.split, None, *more)
        teachers.append(run.train_teacher())
        run.synthesise("synthesis", run.folder / "synthetic")
        found.append(students(run, weights, arguments.steps))
    rows = []
    for same in zip(*found, strict=True):
        seconds, steps = ([row[key] for row in same] for key in ("seconds", "steps"))
        accuracies = [row["accuracy"] for row in same]
        rows.append(
            {"name": same[0]["name"], "weight": same[0]["weight"], "accuracy": accuracies}
            | {"median": median(accuracies), "steps": steps, "seconds": seconds}
        )
    return {"rows": rows, "teacher_accuracy": teachers, "seeds": seeds, "split": arguments.split}


def markdown(result: dict[str, Any]) -> str:
    """Accuracies by seed and their median, steps and seconds of training."""
    lines = ["| mSARC | test accuracy: median | by seed | steps | s of training: median |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        by_seed = " ".join(f"{100 * value:.1f}" for value in row["accuracy"])
        steps = sorted(row["steps"])
        length = str(steps[0]) if steps[0] == steps[-1] else f"{steps[0]} to {steps[-1]}"
        lines.append(
            f"| {row['name']} | {100 * row['median']:.1f} % | {by_seed} | {length} | {median(row['seconds']):.1f} |"
        )
    plain, *others, _ = result["rows"]
    best = max(others, key=lambda row: float(row["median"]))
    gains = [100 * (mine - theirs) for mine, theirs in zip(best["accuracy"], plain["accuracy"], strict=True)]
    differences, machine = " ".join(f"{gain:+.1f}" for gain in gains), result["machine"]
    lines += [
        "",
        f"At equal steps mSARC {_verdict(gains)}: with {best['name']} it is {differences} points, seed by seed. "
        f"The `demo` preset's images and student; {machine['device']}, {machine['threads']} threads, torch "
        f"{machine['versions']['torch']}, {machine['date']}: `python -m benchmarks.msarc`.",
    ]
    return "\n".join(lines)


def _verdict(gains: list[float]) -> str:
    """Of the better weight's gains, seed by seed: two of three seeds prove nothing."""
    if min(gains) > 0:
        return "improves"
    return "does not improve" if max(gains) <= 0 else "improves for some seeds and not for others"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (default 3)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--weights", default="0.3,1", help="of mSARC, comma-separated (default 0.3,1)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a student (default the preset's)")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of the runs")
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="real images to judge on")
    parser.add_argument("--generate", default="", help="more options of dfkd-generate, as one string")
    parser.add_argument("--distill", default="", help="more options of dfkd-distill, as one string")
    parser.add_argument("--record", action="store_true", help=f"write the JSON to {RESULT.name}, for README's table")
    arguments = parser.parse_args()
    machine = describe(torch.device("cpu"))  # before the work: what fails here must not lose it
    result = {**measure(arguments), "machine": machine}
    if arguments.record:
        replace_text(RESULT, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
