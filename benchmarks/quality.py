"""The whole job, judged: teacher, synthesis, student, and what the student is worth beside baselines.

    python -m benchmarks.quality demo --seeds 3                     prints one JSON line at the end
    python -m benchmarks.quality demo --seeds 1 --baselines prior_data,unguided --out runs/demo        `make demo`

Every stage is a command that a user would type, in a process of its own: synthesis and distillation never load the
module that reads real images. All students get equal image counts, distillation steps and augmentation. Settings are
those of the `demo` preset, tuned on the validation split alone (--split validation); the test split is for the end.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks import baselines
from benchmarks.machine import describe
from dfkd.files import replace_text
from dfkd.presets import PRESETS
from dfkd.teachers import checkpoint

DATA = "digits-on-photos"
BASELINES = ("prior_data", "unguided", "unguided_sharpened", "deepinversion", "noise")


def call(command: str, *arguments: object) -> dict[str, Any]:
    """Run one of the installed commands, show it, and return the JSON object of its last line."""
    words = [str(a) for a in arguments]
    print("$ " + shlex.join([command, *words]), file=sys.stderr, flush=True)
    module = "dfkd.cli." + command.removeprefix("dfkd-").replace("-", "_")
    program = f"import sys; sys.argv[0] = {command!r}; from {module} import main; main()"
    done = subprocess.run([sys.executable, "-c", program, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


class Run:
    """One seed's folder and the seconds of its stages."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        split: str,
        teacher: Path | None,
        generate: Sequence[str] = (),
        distill: Sequence[str] = (),
    ) -> None:
        self.folder, self.seed, self.split = folder, seed, split
        self.teacher = teacher or folder / "teacher"
        self.generate, self.distill = list(generate), list(distill)
        self.seconds: dict[str, float] = {}

    def stage(self, name: str, command: str, *arguments: object) -> dict[str, Any]:
        started = time.perf_counter()
        result = call(command, *arguments)
        self.seconds[name] = round(time.perf_counter() - started, 1)
        return result

    def train_teacher(self) -> float:
        out = self.teacher
        result = self.stage("teacher", "dfkd-train-teacher", "--preset", "demo", "--out", out, "--seed", self.seed)
        return float(result["accuracy" if self.split == "test" else "validation_accuracy"])

    def synthesise(self, name: str, out: Path, *more: object) -> dict[str, Any]:
        return self.stage(
            name, "dfkd-generate", "--preset", "demo", "--teacher-checkpoint", self.teacher, "--seed", self.seed,
            "--out", out, *self.generate, *more,
        )  # fmt: skip

    def distilled(self, name: str, data: Path, out: Path, *more: object) -> dict[str, Any]:
        return self.stage(
            name, "dfkd-distill", "--preset", "demo", "--data", data, "--teacher-checkpoint", self.teacher,
            "--out", out, "--seed", self.seed, "--test", DATA, "--test-split", self.split, *self.distill, *more,
        )  # fmt: skip

    def student(self, name: str, data: Path, out: Path) -> float:
        return float(self.distilled(name, data, out)["accuracy"])

    def baseline(self, name: str, count: int, guided_seconds: float) -> float:
        folder = self.folder / "baselines" / name
        data = folder / "synthetic"
        started = time.perf_counter()
        if name == "unguided":
            self.synthesise("unguided synthesis", data, "--guidance-step", 0)
        elif not (data / "manifest.json").exists():
            images, labels = self._images(name, count, guided_seconds)
            baselines.write_shards(data, images, labels, self.seed, name)
            self.seconds[f"{name} images"] = round(time.perf_counter() - started, 1)
        return self.student(f"{name} student", data, folder / "student")

    def _images(self, name: str, count: int, guided_seconds: float) -> tuple[torch.Tensor, torch.Tensor]:
        if name == "prior_data":
            return baselines.prior_data(count, self.seed)
        if name == "noise":
            return baselines.noise(count, self.seed)
        if name == "unguided_sharpened":
            unguided = self.folder / "baselines" / "unguided" / "synthetic"
            if not (unguided / "manifest.json").exists():
                self.synthesise("unguided synthesis", unguided, "--guidance-step", 0)
            return baselines.unguided_sharpened(unguided)
        teacher = checkpoint.load(None, self.teacher)
        teacher.module.requires_grad_(False)
        return baselines.deepinversion(teacher, count, self.seed, guided_seconds)


def whole_run(run: Run, names: Sequence[str]) -> dict[str, Any]:
    """Teacher, synthesis, student, baselines; writes summary.json and the report beside them."""
    trained_here = run.teacher == run.folder / "teacher"
    summary: dict[str, Any] = {"seed": run.seed, "split": run.split}
    if trained_here:
        summary["teacher_accuracy"] = run.train_teacher()
    made = run.synthesise("synthesis", run.folder / "synthetic")
    summary["student_accuracy"] = run.student("student", run.folder / "synthetic", run.folder / "student")
    summary["images"] = made["images"]
    summary["backends"] = made["backends"]
    guided_seconds = json.loads((run.folder / "synthetic" / "manifest.json").read_text())["shards"]
    spent = sum(shard["seconds"] for shard in guided_seconds)
    summary["baselines"] = {name: run.baseline(name, made["images"], spent) for name in names}
    summary["seconds"] = run.seconds
    replace_text(run.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    report = run.stage("report", "dfkd-report", "--run", run.folder)
    return {**summary, "seconds": run.seconds, "report": report}


def table(summary: dict[str, Any]) -> str:
    """Accuracies as a small table for people."""
    rows = [("student on guided images", summary["student_accuracy"])]
    rows += [(f"student on {name}", value) for name, value in summary["baselines"].items()]
    if "teacher_accuracy" in summary:
        rows.append(("teacher", summary["teacher_accuracy"]))
    return "\n".join(f"{name:<36}{100 * value:6.1f} %" for name, value in rows)


def demo(arguments: argparse.Namespace) -> dict[str, Any]:
    names = [name for name in arguments.baselines.split(",") if name]
    if unknown := [name for name in names if name not in BASELINES]:
        sys.exit(f"error: unknown baseline {unknown[0]!r}; known are {', '.join(BASELINES)}")
    results = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        folder = arguments.out / f"seed-{seed}" if arguments.seeds > 1 else arguments.out
        more = shlex.split(arguments.generate), shlex.split(arguments.distill)
        run = Run(folder, seed, arguments.split, arguments.teacher, *more)
        results.append(whole_run(run, names))
        print(table(results[-1]), file=sys.stderr, flush=True)
    first = results[0]
    across = {name: mean(r["baselines"][name] for r in results) for name in names}
    return {
        "student_accuracy": mean(r["student_accuracy"] for r in results),
        "student_accuracy_seeds": [r["student_accuracy"] for r in results],
        "teacher_accuracy": mean(r["teacher_accuracy"] for r in results) if "teacher_accuracy" in first else None,
        "teacher_accuracy_seeds": [r["teacher_accuracy"] for r in results if "teacher_accuracy" in r],
        "baselines": across,
        "baselines_seeds": {name: [r["baselines"][name] for r in results] for name in names},
        "images": first["images"],
        "split": arguments.split,
        "backends": first["backends"],
        "preset": {k: dict(getattr(PRESETS["demo"], k)) for k in ("train_teacher", "generate", "distill")},
        "seconds": first["seconds"] if len(results) == 1 else [r["seconds"] for r in results],
        "report": first["report"] if len(results) == 1 else [r["report"] for r in results],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["demo"], help="which preset to judge")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (default 3)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--baselines", default=",".join(BASELINES), help="comma-separated, default all")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quality"), help="folder of the runs (default runs/quality)"
    )
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="real images to judge on")
    parser.add_argument("--teacher", type=Path, help="use this teacher instead of training one per seed")
    parser.add_argument("--generate", default="", help="more options of dfkd-generate, as one string")
    parser.add_argument("--distill", default="", help="more options of dfkd-distill, as one string")
    parser.add_argument("--record", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    machine = describe(torch.device("cpu"))  # before the work: what fails here must not lose it
    result = {**demo(arguments), "machine": machine}
    if arguments.record:
        kept = {name: value for name, value in result.items() if name != "report"}  # it is of paths on this machine
        replace_text(arguments.record, json.dumps(kept, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
