"""Everything that only a GPU can tell, by one command: sampling, engines, training steps, kernels and loaders.

    python -m benchmarks.gpu_report                 on a CUDA device: at most --minutes 8, no network needed
    python -m benchmarks.gpu_report --only soft_kl,engines
    python -m benchmarks.gpu_report --rehearse      the same code on tiny sizes on a CPU: proves that it runs, no more

Each section is a benchmark of its own in a process of its own, so that one that fails, hangs or lacks a package costs
its rows and no others; the reason stands in the report. The most telling come first; sections that a spent --minutes
does not reach are named too, and --only measures them later. Benchmarks tell their rows as they come: stopped or broken
off they keep those until then.

Writes benchmarks/results/gpu-report-<device>.json with what every section measured, and the same as tables in .md. What
is on record there of other sections stays, each with its own commit, date and versions. A section that measures nothing
now, or is stopped where a whole result is on record, leaves that result and is named beside it. To begin anew, delete
the files. A rehearsal writes nothing. The last line of stdout is this run's JSON.

A section on record is {"machine", "seconds"} with "result", what it measured, or "why" it measured nothing; with both
it was stopped, and the result has the rows until then. "again" is a later try that the result outlived: {"machine",
"seconds", "why"}. The record's own "machine" is that of the last run.
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

from benchmarks.machine import describe, name_of
from benchmarks.recording import RESULTS, names_of
from dfkd.files import replace_text

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


def _kernel(title: str, name: str, given: str, rehearsed: str) -> Section:
    own = f"--rehearse --repeats 1 {rehearsed}"
    return Section(title, f"bench_{name}", "bandwidth", f"--no-resources {given}", own, 60)


SECTIONS: Mapping[str, Section] = {
    "sampling": Section(
        "Sampling of Stable Diffusion 1.5, ours beside the published loop and diffusers",
        "bench_sampling",
        "driver",
        "--prior sd15 --device cuda --repeats 3 --compile-mode reduce-overhead",  # max-autotune compiles for minutes
        "--prior sd15 --thin --size 64 --device cpu --dtype fp32 --images 2 --repeats 1",
        180,
    ),
    "distill": Section(
        "Steps of distillation",
        "bench_distill",
        "driver",
        "--device cuda",
        "--device cpu --pairs resnet8_half:resnet8_half:32:8 --repeats 1 --ways eager,channels_last,bf16,compile,all",
        100,
    ),
    "engines": Section(
        "Networks of Stable Diffusion 1.5 at 512x512, random weights",
        "bench_engines",
        "driver",
        "--sd15 512 --device cuda --dtype fp16 --rows 16 --networks unet,gradient,decode --repeats 3"
        " --backends eager,channels_last,torch.compile,tensorrt",
        "--sd15 64 --thin --device cpu --rows 2 --networks unet,gradient,decode --backends eager,channels_last"
        " --repeats 1",
        200,
    ),
    "guided_step": _kernel("A guided step", "guided_step", "--batches 64,512", "--batches 2"),
    "soft_kl": _kernel(
        "Distillation's loss", "soft_kl", "--batches 256,65536 --classes 1000", "--batches 2 --classes 10"
    ),
    "group_norm_silu": _kernel(
        "Group normalisation with SiLU", "group_norm_silu", "--maps 512x64,128x512 --batches 4",
        "--maps 64x2 --batches 1",
    ),
    "bn_moments": _kernel(
        "A frozen teacher's BatchNorm with its ReLU and moments", "bn_moments", "--maps 64x32,256x56 --batches 64",
        "--maps 8x4 --batches 2",
    ),
    "loader": Section(
        "Loaders, and what they cost a step",
        "bench_loader",
        "driver",
        "--device cuda --repeats 3",
        "--quick --device cpu --workers 0 --repeats 1",
        90,
    ),
}  # fmt: skip


class RecordError(ValueError):
    """What lies there is no record that could be kept."""


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
    return {**spent, **(until_then(done.stdout) or {"why": "its output has no line of JSON"})}


def until_then(stdout: str) -> dict[str, Any]:
    """{"result"} of the last whole line of JSON that a process told, or nothing."""
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


def read(path: Path) -> dict[str, Any]:
    """By section what is on record, nothing where there is no file. Raises RecordError."""
    if not path.exists():
        return {}
    try:
        sections: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["sections"]
        unknown = [name for name, found in sections.items() if name not in SECTIONS or "machine" not in found]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RecordError(f"{path} is no record of a gpu-report: move it away") from None
    if unknown:
        raise RecordError(f"{path} has a section {unknown[0]!r} of another version of gpu-report: move it away")
    return sections


def merged(record: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The record with what was found now, in the order of SECTIONS: nothing on record gives way to less.

    A whole result gives way to a whole one, that of a stopped section to any; else it stays, the later try noted.
    """
    found = dict(record)
    for name, own in now.items():
        before = record.get(name, {})
        if "result" in before and ("result" not in own or ("why" in own and "why" not in before)):
            found[name] = {**before, "again": {key: own[key] for key in ("machine", "seconds", "why")}}
        else:
            found[name] = own
    return {name: found[name] for name in SECTIONS if name in found}


def made_with(machine: Mapping[str, Any]) -> str:
    """Versions, commit and date of `benchmarks.machine.describe`."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"{versions}; Python {machine['python']}, commit {machine['commit']}, {machine['date']}"


def markdown(result: Mapping[str, Any]) -> str:
    """The report for people: a table a section, or its reason."""
    machine = result["machine"]
    parts = [f"# {machine['device']}", f"{made_with(machine)}: `make gpu-report`."]
    for name, found in result["sections"].items():
        parts.append(f"## {SECTIONS[name].title}")
        if "result" in found:
            parts.append(
                importlib.import_module(f"benchmarks.{SECTIONS[name].tables}").markdown(found["result"]).strip()
            )
        if "why" in found:
            parts.append(f"{'Rows until then' if 'result' in found else 'Not measured'}: {found['why']}.")
        if (own := made_with(found["machine"])) != made_with(machine):
            parts.append(f"With {own}.")
        if "again" in found:
            parts.append(f"Tried again with {made_with(found['again']['machine'])}: {found['again']['why']}.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = f"of {', '.join(SECTIONS)} (default all); the others stay on record"
    parser.add_argument("--only", type=names_of(SECTIONS), default=list(SECTIONS), help=text)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU; writes nothing")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all sections together (default 8)")
    a = parser.parse_args()
    if not a.rehearse and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device: gpu_report needs one (--rehearse tries the code on a CPU)")
    machine = describe(torch.device("cpu" if a.rehearse else "cuda"))
    path = RESULTS / f"gpu-report-{name_of(machine)}.json"
    try:
        record = {} if a.rehearse else read(path)  # before the work: what fails here must not lose it
    except RecordError as error:
        sys.exit(f"error: {error}")
    found = {name: {"machine": machine, **own} for name, own in report(a.only, a.rehearse, a.minutes).items()}
    result = {"machine": machine, "sections": found}
    if not a.rehearse:
        kept = {"machine": machine, "sections": merged(record, found)}
        replace_text(path, json.dumps(kept, indent=1) + "\n")
        replace_text(path.with_suffix(".md"), markdown(kept))
    print("", markdown(result), sep="\n", file=sys.stderr)
    print(json.dumps(result))
    if not any("result" in own for own in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
