"""Launches timed in turns with a copy: bytes that must move, bandwidth, share of the copy's, ratio to eager.

Bytes that must move are those of tensors read once or written once; a launch that moves more has a smaller share.
Shares and ratios are taken within a turn. Small launches are over before Python has begun the next one, and show its
time instead. Without a GPU nothing of it can be measured, since Triton's interpreter executes Python: then there are
the floors on GPUs of known bandwidth, and the resources of the compiled kernels. With TRITON_INTERPRET=1, --rehearse
runs every way there nevertheless, to see that it does.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.driver import repeated
from benchmarks.flops import SHEETS, in_turns
from benchmarks.kernel_resources import markdown as table
from benchmarks.machine import describe, name_of
from dfkd.files import replace_text

RESULTS = Path(__file__).parent / "results"
COPY_BYTES = 2**30  # far more than a cache holds
CALLS = 20  # a measurement: one launch is over before a clock of the host has ticked


@dataclass(frozen=True)
class Launch:
    """A launch at one size.

    labels: what it is, columns of the table. moved: bytes. ways: makes its tensors on a device and gives calls that do
    the same by several means, compared with the one named "eager".
    """

    labels: Mapping[str, Any]
    moved: int
    ways: Callable[[torch.device], Mapping[str, Callable[[], object]]]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile for the shapes it is called with."""
    return torch.compile(function, dynamic=False)


def bench(
    launches: Iterable[Launch],
    turns: int,
    device: torch.device,
    rehearse: bool = False,
    so_far: Callable[[dict[str, Any]], object] = lambda found: None,
) -> dict[str, Any]:
    """Rows of the table, and what could not be run, with the reason. rehearse: one call each, and a copy of a page.

    so_far: is given, after every launch, what would be returned if it were the last.
    """
    copy_bytes, calls_each = (2**12, 1) if rehearse else (COPY_BYTES, CALLS)
    source = torch.empty(copy_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    copies: list[float] = []

    def result() -> dict[str, Any]:
        return {"turns": turns, "copy_bytes_per_second": median(copies), "rows": rows, "failures": failures}

    for launch in launches:
        calls = {way: repeated(call, calls_each) for way, call in launch.ways(device).items()}
        calls["copy"] = repeated(lambda: target.copy_(source), calls_each)
        with torch.no_grad():
            seconds, failed = in_turns(calls, turns, device)
        # torch.compile keeps eight shapes of a function, and of a ninth it runs the function itself.
        torch.compiler.reset()
        failures += [{**launch.labels, "way": way, "why": why} for way, why in failed.items()]
        copy = [copy_bytes * calls_each / s for s in seconds.pop("copy")]
        copies += copy
        eager = seconds.get("eager")
        for way, spent in seconds.items():
            speed = [launch.moved * calls_each / s for s in spent]
            found = {
                **launch.labels, "way": way,
                "microseconds": 1e6 * median(spent) / calls_each,
                "bytes": launch.moved, "bytes_per_second": median(speed),
                "share_of_copy": median(s / c for s, c in zip(speed, copy, strict=True)),
                "ratio": median(e / s for e, s in zip(eager, spent, strict=True)) if eager else None,
            }  # fmt: skip
            rows.append(found)
        so_far(result())
    return result()


def floor(launch: Launch) -> dict[str, Any]:
    """Microseconds that it cannot be quicker than, at the bandwidths of data sheets; a copy reaches nine tenths."""
    speeds = {f"us on {sheet.name}": round(1e6 * launch.moved / sheet.bandwidth, 2) for sheet in SHEETS.values()}
    return {**launch.labels, "MB": round(launch.moved / 1e6, 2), **speeds}


def resources() -> list[dict[str, Any]]:
    """What kernel_resources finds, in a process of its own: here the kernels may be interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernel_resources"]
    done = subprocess.run(command, cwd=RESULTS.parents[1], env=env, capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def markdown(result: dict[str, Any]) -> str:
    measured = ("microseconds", "bytes", "bytes_per_second", "share_of_copy", "ratio")
    labels = [name for name in (result["rows"] or [{}])[0] if name not in measured]
    heads = [*labels, "us", "MB", "GB/s", "of a copy", "ratio to eager"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in result["rows"]:
        cells = [*(r[name] for name in labels), f"{r['microseconds']:.1f}", f"{r['bytes'] / 1e6:.2f}"]
        cells += [f"{r['bytes_per_second'] / 1e9:.0f}", f"{100 * r['share_of_copy']:.0f} %"]
        cells += ["-" if r["ratio"] is None else f"{r['ratio']:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", *(f"Not measured: {', '.join(map(str, f.values()))}" for f in result["failures"])]
    return "\n".join(lines)


def report(name: str, launches: Iterable[Launch], a: argparse.Namespace) -> None:
    """Floors and resources, on a GPU the measurement too; tables on stderr, JSON on stdout's last line.

    A line of JSON follows every launch with what was measured until then, for who stops it.
    a.record writes results/<name>-<device>.json. a.rehearse: on a CPU, only to see that it runs.
    """
    if a.record and a.rehearse:
        sys.exit("error: a rehearsal is not recorded")
    launches = list(launches)
    device = torch.device("cuda" if torch.cuda.is_available() and not a.rehearse else "cpu")
    result: dict[str, Any] = {"machine": describe(device), "floors": [floor(launch) for launch in launches]}
    if a.resources and not a.rehearse:
        result["resources"] = resources()
        print(table(result["floors"]), "", table(result["resources"]), sep="\n", file=sys.stderr)
    if device.type == "cuda" or a.rehearse:
        result |= bench(
            launches, a.repeats, device, a.rehearse,
            so_far=lambda found: print(json.dumps(result | found), flush=True),
        )  # fmt: skip
        print("", markdown(result), sep="\n", file=sys.stderr)
        if a.record:
            replace_text(RESULTS / f"{name}-{name_of(result['machine'])}.json", json.dumps(result, indent=1) + "\n")
    else:
        result["not_measured"] = "no GPU: neither times nor the copy's bandwidth, and so no share and no ratio"
        print("", f"Not measured: {result['not_measured']}.", sep="\n", file=sys.stderr)
    print(json.dumps(result))


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--repeats", type=int, default=11, help="turns (default 11)")
    found.add_argument("--rehearse", action="store_true", help="run it all on a CPU, where times mean nothing")
    found.add_argument(
        "--resources", action=argparse.BooleanOptionalAction, default=True, help="compile all kernels, half a minute"
    )
    found.add_argument("--record", action="store_true", help=f"write benchmarks/results/{name}-<device>.json")
    return found


def integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def maps_of(text: str) -> list[tuple[int, int]]:
    """64x32,128x16 -> channels, and height and width, of feature maps."""
    return [(int(channels), int(side)) for channels, _, side in (word.partition("x") for word in text.split(","))]
