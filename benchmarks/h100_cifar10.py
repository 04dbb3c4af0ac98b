"""CIFAR-10 with Stable Diffusion 1.5 on an H100 in an hour: speeds first, then guided images beside unguided ones.

    python -m benchmarks.h100_cifar10 --prior stable-diffusion-v1-5 --data parquet:cifar10 --out runs/h100
    python -m benchmarks.h100_cifar10 --rehearse --out runs/rehearsal      a minute of a CPU, with the demo's networks

prior: a folder in diffusers' layout, or a hub id, whose weights are fetched before the hour begins. data: CIFAR-10, as
docs/own-data.md names it. teacher: a folder of dfkd-train-teacher, instead of one that is trained here.

Each stage is a command in a process of its own with a time cap; the caps make 60 minutes. One that fails or is stopped
costs those that need it, which are named with the reason. Started again, what is done stays and the rest goes on. What
is missing is said before the first minute, with status 2.

    speed                       sampling of Stable Diffusion 1.5: the shares of the peak that docs/cost.md assumes
    teacher                     WRN-40-2 on CIFAR-10
    engines                     the guided networks by Inductor; what is ready by then is taken where it is quicker
    plan, plan-unguided         seconds of an image, from which the images of both sets follow: equal seconds
    images, student             guided images, and WRN-16-2 that learns from them
    unguided, unguided-student  the same without guidance by the teacher, with classifier-free guidance in all steps
    report                      both students on CIFAR-10's test images, and the page OUT/report

OUT is a folder of dfkd-run, whose file is OUT/h100_cifar10.toml. OUT/results.json has every stage with its command,
seconds, result, machine, versions, commit and date, and OUT/logs what it said; the last line of stdout is the same
JSON. Status 1: some stage did not come to its end.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_report import reason, until_then
from benchmarks.machine import describe
from dfkd import teachers
from dfkd.config import GenerateCommand, merged, read_preset, section
from dfkd.errors import UsageError
from dfkd.evaluation import class_names_of, open_test
from dfkd.files import make_writable, read_object, replace_text
from dfkd.run import read_job
from dfkd.runtime import resolve_device
from dfkd.synthesis.command import quieten_libraries
from dfkd.teachers import load_teacher
from dfkd_engine.errors import EngineError
from dfkd_engine.priors.prior import Prior

ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks" / "h100_cifar10.toml"
RESULTS = "results.json"
SPEED = "--prior sd15 --device cuda --rows published,unet,latent,late --repeats 3"
SPEED_REHEARSED = "--prior demo --device cpu --images 2 --repeats 1 --rows late"
REHEARSED_SECONDS = 2.0  # of the images
CLASSES = 10  # of CIFAR-10
GRACE = 20.0  # seconds from SIGTERM, at which a training saves its state, to SIGKILL
PART = 0.8  # of a cap that images are planned for: the plan does not count what is between the networks' calls
PLANNED = 2000  # images that a plan is asked about
REHEARSAL: Mapping[str, Mapping[str, Any]] = {
    "teacher": {"data": "digits-on-photos", "architecture": "resnet8_half", "epochs": "none", "steps": 4},
    "generate": {"dtype": "fp32", "group": 10, "batch": 10, "shard-size": 10, "steps": 3, "refine-steps": 0},
    "unguided": {"guidance-step": 0.0, "cfg-to": 1.0},
    "distill": {"student": "resnet8_half", "steps": 2, "batch-size": 8, "warmup": 0},
    "evaluate": {"data": "digits-on-photos"},
}


@dataclass(frozen=True)
class Stage:
    """minutes: its cap. needs: stages without which it cannot be."""

    minutes: float
    needs: tuple[str, ...] = ()


STAGES: Mapping[str, Stage] = {  # the most telling first
    "speed": Stage(6),
    "teacher": Stage(6),
    "engines": Stage(8, ("teacher",)),
    "plan": Stage(2, ("teacher",)),
    "plan-unguided": Stage(1, ("teacher",)),
    "images": Stage(13, ("plan",)),
    "student": Stage(4, ("images",)),
    "unguided": Stage(13, ("plan-unguided",)),
    "unguided-student": Stage(4, ("unguided",)),
    "report": Stage(3, ("student", "unguided-student")),
}
SETS = {"images": ("plan", "student"), "unguided": ("plan-unguided", "unguided-student")}  # around each set of images


def read_file(out: Path, prior: str, data: str, teacher: Path | None, rehearse: bool) -> dict[str, Any]:
    """The run as a file of dfkd-run, but for how many images."""
    file = tomllib.loads(FILE.read_text(encoding="utf-8"))
    if rehearse:
        own = {name: dict(changes) for name, changes in REHEARSAL.items()}
        file = {"preset": "demo", "controls": [], "baselines": {"unguided": own.pop("unguided")}, **own}
    else:
        file["teacher"]["data"] = data
        file["generate"]["prior"] = prior
        file["evaluate"] = {"data": data}
    file["generate"]["engines"] = str(out / "engines")
    if teacher is not None:
        file["teacher"] = {"checkpoint": str(teacher)}
    return file


def require_gpu() -> None:
    """Raise UsageError where torch finds none."""
    if not torch.cuda.is_available():
        raise UsageError("no CUDA device", "torch finds none", "try the code with --rehearse, on a CPU")


def check(file: Mapping[str, Any], out: Path, rehearse: bool) -> str:
    """The teacher's architecture. Raises UsageError or EngineError for what is missing; weights of a hub's prior are
    here afterwards."""
    if not rehearse:
        require_gpu()
    job = read_job(file, out)
    asked = job.variants[0].generate
    if job.teacher is not None and job.classifier.classes:  # or it would be told once the teacher is trained
        found = class_names_of(job.teacher.data)
        if found and found != job.classifier.classes:
            why = f"its classes are {', '.join(found[:CLASSES])}"
            raise UsageError(f"--data {job.teacher.data} is not CIFAR-10", why, "give CIFAR-10, by its names and order")
    teacher = job.teacher.architecture if job.teacher is not None else load_teacher(job.classifier).architecture
    make_writable(out)
    if job.evaluate is not None:
        open_test(job.evaluate.data, job.evaluate.split, teachers.input_size(job.variants[0].distill.distill.student))
    Prior.from_pretrained(asked.prior.source, dtype=asked.generate.compute.dtype, **asked.prior.files())
    return teacher


def words(options: Mapping[str, Any]) -> list[str]:
    """Options of a section as flags."""
    found = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{'' if value else 'no-'}{flag}")
        else:
            found += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return found


def commands(
    file: Mapping[str, Any], out: Path, architecture: str, counts: Mapping[str, int], rehearse: bool
) -> dict[str, list[str]]:
    """The words of each stage. counts: images of both sets, as far as they are planned."""
    python = [sys.executable, "-m"]
    preset, of_teacher = ["--preset", file["preset"]], file["teacher"].get("checkpoint", out / "teacher")
    teacher = ["--teacher", architecture, "--teacher-checkpoint", of_teacher]
    folders = {"images": out, "unguided": out / "baselines" / "unguided"}
    settings = {"images": file["generate"], "unguided": {**file["generate"], **file["baselines"]["unguided"]}}
    test = file["evaluate"]["data"]
    found: dict[str, list[Any]] = {
        "speed": [*python, "benchmarks.bench_sampling", *shlex.split(SPEED_REHEARSED if rehearse else SPEED)],
        "teacher": [*python, "dfkd", "train-teacher", *preset, *words(file["teacher"]), "--out", out / "teacher"],
    }
    for name, (plan, student) in SETS.items():
        making, folder = [*python, "dfkd", "generate", *preset, *words(settings[name]), *teacher], folders[name]
        learning = [*python, "dfkd", "distill", *preset, *words(file["distill"]), *teacher, "--test", test]
        found |= {
            plan: [*making, "--count", PLANNED, "--plan-only", "--out", folder / "synthetic"],
            name: [*making, "--count", counts.get(name, PLANNED), "--out", folder / "synthetic"],
            student: [*learning, "--data", folder / "synthetic", "--out", folder / "student"],
        }
    by = ["--backend", "onnxruntime", "--only", "decode"] if rehearse else ["--backend", "inductor"]
    building = [*python, "dfkd", "engines", "build", *by, "--engines", out / "engines"]
    found["engines"] = [*building, "--", *preset, *words(settings["images"]), *teacher]
    found["report"] = [*python, "dfkd", "run", out / FILE.name, "--out", out]
    return {name: list(map(str, found[name])) for name in STAGES}


def counted(planned: Mapping[str, Any], seconds: float, group: int) -> int:
    """How many images fit the seconds, in whole groups and at least one. planned: of dfkd-generate --plan-only."""
    plan = planned["plan"]
    return max(int(PART * seconds * plan["images"] / plan["predicted_seconds"]) // group, 1) * group


def toml(file: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """A file of dfkd-run as text: strings, numbers, truth values and lists, which JSON writes as TOML does."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in file.items() if not isinstance(value, Mapping)]
    sections = {name: value for name, value in file.items() if isinstance(value, Mapping) and name != "baselines"}
    sections |= {f"baselines.{name}": value for name, value in file["baselines"].items()}
    for name, of in (("generate", "images"), ("baselines.unguided", "unguided")):
        sections[name] = {**sections[name], **({"count": counts[of]} if of in counts else {})}
    for name, options in sections.items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in options.items())]
    return "\n".join(lines) + "\n"


def run(command: Sequence[str], seconds: float, logs: Path) -> dict[str, Any]:
    """What a command told, {"seconds", "result"}; with "why" where it did not come to its end, by itself or the cap.

    logs: its output goes to the files logs.out and logs.log.
    """
    logs.parent.mkdir(parents=True, exist_ok=True)
    told, said = (logs.with_name(f"{logs.name}.{kind}") for kind in ("out", "log"))
    started, stopped = time.perf_counter(), False
    with told.open("w") as out, said.open("w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            stopped = True
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            process.kill()
            process.wait()
    found = {"seconds": round(time.perf_counter() - started, 1), **until_then(told.read_text(errors="replace"))}
    if stopped:
        return {**found, "why": f"it was stopped after {seconds / 60:g} minutes; started again it goes on"}
    if process.returncode:
        return {**found, "why": reason(said.read_text(errors="replace")) or f"exit status {process.returncode}"}
    return found if "result" in found else {**found, "why": "its output has no line of JSON"}


def stages(
    file: dict[str, Any], out: Path, architecture: str, rehearse: bool, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """By name what `run` returns of every stage, with its command and machine; OUT/results.json after each.

    Raises UsageError: OUT/results.json is no record of stages.
    """
    path, shape = out / RESULTS, {"stages": {...: {}}}
    found: dict[str, Any] = {}
    if path.exists():
        found |= read_object(path, shape, "move it away", needed=("stages",))["stages"]
    own = merged(GenerateCommand, section(read_preset(file["preset"]), "generate"), section(file, "generate"))
    counts: dict[str, int] = {}
    for name, stage in STAGES.items():
        if name == "teacher" and "checkpoint" in file["teacher"]:
            found[name] = {"seconds": 0.0, "result": {"out": file["teacher"]["checkpoint"]}}
            continue
        if name in SETS and done(found, plan := SETS[name][0]):
            seconds = REHEARSED_SECONDS if rehearse else 60 * stage.minutes
            counts[name] = counted(found[plan]["result"], seconds, own["group"])
        command = commands(file, out, architecture, counts, rehearse)[name]
        if done(found, name) and found[name]["command"] == command:
            continue
        print(f"{name}, {stage.minutes:g} minutes at most: {shlex.join(command)}", file=sys.stderr, flush=True)
        if lacking := [need for need in stage.needs if not done(found, need)]:
            told: dict[str, Any] = {"seconds": 0.0, "why": f"{lacking[0]} is not done"}
        else:
            replace_text(out / FILE.name, toml(file, counts))
            told = run(command, 60 * stage.minutes, out / "logs" / name)
        print(f"    {told.get('why', 'done')}, {told['seconds']} s", file=sys.stderr, flush=True)
        found[name] = {"command": command, "machine": machine, **told}
        replace_text(path, json.dumps({"stages": found}, indent=1) + "\n")
    return found


def done(found: Mapping[str, Any], stage: str) -> bool:
    """Whether a stage has come to its end."""
    return stage in found and "why" not in found[stage]


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that matter, as far as they are: accuracies, images and their seconds, shares of the peak."""
    told = {name: stage.get("result", {}) for name, stage in found.items()}
    rows = told["speed"].get("rows", [])
    return {
        "mfu": {row["name"]: row["mfu"] for row in rows},
        "images": {name: told[name].get("images") for name in ("images", "unguided")},
        "seconds": {name: told[name].get("seconds") for name in ("images", "unguided")},
        "accuracy": {name: told[name].get("accuracy") for name in ("teacher", "student", "unguided-student")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", help="folder or hub id of Stable Diffusion 1.5")
    parser.add_argument("--data", help="CIFAR-10, such as parquet:FOLDER or cifar:FOLDER")
    parser.add_argument("--teacher", type=Path, help="folder of dfkd-train-teacher, instead of training one")
    parser.add_argument("--out", type=Path, default=Path("runs/h100-cifar10"), help="folder (default %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="the same on a CPU with the demo's networks")
    a = parser.parse_args()
    if a.rehearse == bool(a.prior and a.data):
        parser.error("give --prior and --data, or --rehearse alone")
    out = a.out.resolve()
    quieten_libraries()
    try:
        file = read_file(out, a.prior, a.data, a.teacher, a.rehearse)
        architecture = check(file, out, a.rehearse)
        if a.prior and not Path(a.prior).exists():
            file["generate"]["offline"] = True  # it was fetched just now: no stage waits for the hub
        found = stages(file, out, architecture, a.rehearse, describe(resolve_device("auto")))
    except (UsageError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps({"out": str(out), **summary(found), "stages": found}))
    if any("why" in stage for stage in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
