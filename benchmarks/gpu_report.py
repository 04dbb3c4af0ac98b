"""Everything that only a GPU can tell, by one command: kernels, engines, sampling, training steps and loaders.

    python -m benchmarks.gpu_report                 on a CUDA device: at most --minutes 8, no network needed
    python -m benchmarks.gpu_report --only soft_kl,engines
    python -m benchmarks.gpu_report --rehearse      the same code on tiny sizes on a CPU: proves that it runs, no more

Each section is a benchmark of its own in a process of its own, so that one that fails, hangs or lacks a package costs
its rows and no others; the reason stands in the report. Sections that a spent --minutes does not reach are named too.
Launches, engines and distill tell their rows as they come: stopped or broken off they keep those until then.

Writes benchmarks/results/gpu-report-<device>.json with what every section measured, and the same as tables in .md. What
is on record there of other sections stays, each with its own commit, date and versions. A section that measures nothing
now, or is stopped where a whole result is on record, leaves that result and is named beside it. To begin anew, delete
the files. A rehearsal writes nothing. The last line of stdout is this run's JSON.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_record import RecordError, made_with, merged, read
from benchmarks.machine import describe, name_of
from dfkd.files import replace_text

RESULTS = Path(__file__).parent / "results"
REHEARSAL = {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}


@dataclass(frozen=True)
class Section:
    """module: of benchmarks, a command with JSON in its last line. tables: of benchmarks, with its `markdown(result)`.

    given, rehearsed: its arguments on a GPU, and for a rehearsal. seconds: the most that it may take.
    """

    title: str
    module: str
    tables: str
    given: str
    rehearsed: str
    seconds: int


# Those that need torch and Triton alone come first; what each may take leaves room for all of them in eight minutes.
SECTIONS: Mapping[str, Section] = {
    "guided_step": Section(
        "Launches of a guided step",
        "bench_guided_step",
        "bandwidth",
        "--no-resources",
        "--rehearse --batches 2 --repeats 1",
        60,
    ),
    "soft_kl": Section(
        "Distillation's loss",
        "bench_soft_kl",
        "bandwidth",
        "--no-resources --batches 256,65536 --classes 100,1000",
        "--rehearse --batches 2 --classes 10 --repeats 1",
        60,
    ),
    "group_norm_silu": Section(
        "Group normalisation with SiLU",
        "bench_group_norm_silu",
        "bandwidth",
        "--no-resources --maps 512x64,128x512,1280x8 --batches 4",
        "--rehearse --maps 64x2 --batches 1 --repeats 1",
        70,
    ),
    "batch_norm_tap": Section(
        "A frozen teacher's BatchNorm with its ReLU and moments",
        "bench_batch_norm_tap",
        "bandwidth",
        "--no-resources --maps 64x32,64x112,256x56,512x28 --batches 64",
        "--rehearse --maps 8x4 --batches 2 --repeats 1",
        70,
    ),
    "distill": Section(
        "Steps of distillation",
        "bench_distill",
        "bench_distill",
        "--device cuda",
        "--quick --device cpu --ways 'eager,channels_last,bf16,compile,cached logits,all'",
        120,
    ),
    "loader": Section(
        "Loaders, and what they cost a step",
        "bench_loader",
        "bench_loader",
        "--device cuda --turns 3",
        "--quick --device cpu --workers 0",
        90,
    ),
    "sampling": Section(
        "Sampling of Stable Diffusion 1.5, ours beside the published loop and diffusers",
        "sd15_sampling",
        "sd15_sampling",
        "--device cuda --compile-mode reduce-overhead",  # max-autotune compiles for minutes
        "--thin --size 64 --device cpu --dtype fp32 --batches 2 --steps 2 --repeats 1",
        180,
    ),
    "engines": Section(
        "Networks of Stable Diffusion 1.5 at 512x512, random weights",
        "bench_engines",
        "bench_engines",
        "--sd15 512 --device cuda --dtype fp16 --rows 4,16 --networks unet,decode,gradient --repeats 3"
        " --backends eager,channels_last,torch.compile,tensorrt",
        "--sd15 64 --thin --device cpu --rows 2 --networks unet,decode,gradient --backends eager,channels_last"
        " --repeats 1",
        240,
    ),
    "paths": Section(
        "Guidance paths of the demo",
        "guidance_paths",
        "guidance_paths",
        "--device cuda",
        "--rehearse --repeats 1 --singles 1",
        120,
    ),
}
DIFFUSION = ("sampling", "engines", "paths")  # their networks are diffusers'


def run(section: Section, rehearse: bool, seconds: float) -> dict[str, Any]:
    """What a section measured, {"seconds", "result"}, or {"seconds", "why"} where it measured nothing.

    With both it did not come to its end, and the result is the last that it told until then.
    """
    arguments = section.rehearsed if rehearse else section.given
    command = [sys.executable, "-m", f"benchmarks.{section.module}", *shlex.split(arguments)]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=RESULTS.parents[1], capture_output=True, text=True, timeout=seconds, env=environment(rehearse)
        )
    except subprocess.TimeoutExpired as stopped:
        told = (stopped.stdout or b"").decode(errors="replace")  # bytes, whatever was asked for
        return {"seconds": round(seconds, 1), "why": f"it was stopped after {seconds:.0f} s", **until_then(told)}
    spent = {"seconds": round(time.perf_counter() - started, 1)}
    if done.returncode:
        why = reason(done.stderr) or f"it ended with exit status {done.returncode}"
        return {**spent, "why": why, **until_then(done.stdout)}
    try:
        return {**spent, "result": json.loads(done.stdout.strip().splitlines()[-1])}
    except (IndexError, ValueError):
        return {**spent, "why": "its last line is no JSON"}


def until_then(stdout: str) -> dict[str, Any]:
    """{"result"} of the last whole line of JSON that a process told which did not come to its end, or nothing."""
    for line in reversed(stdout.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:  # other words, or a line that was cut
            continue
        if isinstance(found, dict):
            return {"result": found}
    return {}


def environment(rehearse: bool) -> dict[str, str]:
    """A rehearsal's kernels are interpreted and torch.compile compiles nothing; on a GPU neither is so."""
    own = {name: value for name, value in os.environ.items() if name not in REHEARSAL}
    return own | (REHEARSAL if rehearse else {})


def reason(stderr: str) -> str:
    """Why a process failed, from the end of what it said."""
    if absent := re.findall(r"No module named '([\w.]+)'", stderr):
        return f"{absent[-1]} is not installed"
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def report(names: Sequence[str], rehearse: bool, minutes: float) -> dict[str, Any]:
    """By section what `run` returns, in order; those that the time does not reach have a reason too."""
    ends = time.perf_counter() + 60 * minutes
    found: dict[str, Any] = {}
    for name in names:
        section, left = SECTIONS[name], ends - time.perf_counter()
        print(f"{name}: {section.title}", file=sys.stderr, flush=True)
        if left <= 0:
            found[name] = {"seconds": 0.0, "why": f"{minutes:g} minutes were over"}
        else:
            found[name] = run(section, rehearse, min(section.seconds, left))
        print(f"    {found[name].get('why', 'measured')}, {found[name]['seconds']} s", file=sys.stderr, flush=True)
    return found


def markdown(result: dict[str, Any]) -> str:
    """The report for people: a table a section, or its reason."""
    machine = result["machine"]
    parts = [f"# {machine['device']}", f"{made_with(machine)}: `make gpu-report`."]
    for name, found in result["sections"].items():
        parts.append(f"## {SECTIONS[name].title}")
        if "result" in found:
            parts.append(table(SECTIONS[name], found["result"]))
        if "why" in found:
            parts.append(f"{'Rows until then' if 'result' in found else 'Not measured'}: {found['why']}.")
        if (own := made_with(found["machine"])) != made_with(machine):
            parts.append(f"With {own}.")
        if "again" in found:
            parts.append(f"Tried again with {made_with(found['again']['machine'])}: {found['again']['why']}.")
    return "\n\n".join(parts) + "\n"


def table(section: Section, result: Any) -> str:
    try:
        module = importlib.import_module(f"benchmarks.{section.tables}")
    except ModuleNotFoundError as error:  # it was measured before, where the package was there
        return f"Its table needs {error.name}, which is not installed; the JSON has the numbers."
    return str(module.markdown(result)).strip()


def sections(text: str) -> list[str]:
    found = text.split(",")
    if unknown := [name for name in found if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; known are {', '.join(SECTIONS)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = f"of {', '.join(SECTIONS)} (default all); the others stay on record"
    parser.add_argument("--only", type=sections, default=list(SECTIONS), help=text)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU; writes nothing")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all sections together (default 8)")
    a = parser.parse_args()
    if not a.rehearse and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device: gpu_report needs one (--rehearse tries the code on a CPU)")
    machine = describe(torch.device("cpu" if a.rehearse else "cuda"))
    path = RESULTS / f"gpu-report-{name_of(machine)}.json"
    try:
        record = {} if a.rehearse else read(path, SECTIONS)  # before the work: what fails here must not lose it
    except RecordError as error:
        sys.exit(f"error: {error}")
    found = {name: {"machine": machine, **own} for name, own in report(a.only, a.rehearse, a.minutes).items()}
    result = {"machine": machine, "sections": found}
    if not a.rehearse:
        kept = {"machine": machine, "sections": merged(record, found, SECTIONS)}
        replace_text(path, json.dumps(kept, indent=1) + "\n")
        replace_text(path.with_suffix(".md"), markdown(kept))
    print("", markdown(result), sep="\n", file=sys.stderr)
    print(json.dumps(result))
    if not any("result" in found for found in result["sections"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
