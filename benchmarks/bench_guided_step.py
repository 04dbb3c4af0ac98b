"""The launches of a guided step beside eager PyTorch and torch.compile: bytes, bandwidth, share of a copy's.

    python -m benchmarks.bench_guided_step                      on a GPU where there is one
    python -m benchmarks.bench_guided_step --batches 64,512

Latents [B, 4, 64, 64] float32, networks in float16, all channels_last. Bytes are those that must move: every tensor
read once or written once. (With a norm each program reads its image's gradient again, which the cache holds.) All ways
run in turns with a copy that moves 1 GiB, and shares are taken within a turn. Without a GPU nothing here can be
measured: Triton's interpreter executes Python. Then the floors on GPUs of known bandwidth are printed, and the
resources of the compiled kernels.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.flops import in_turns
from benchmarks.kernel_resources import markdown as resources_table
from benchmarks.machine import describe
from dfkd.files import replace_text
from kernels.guided_step import GUIDED_STEPS, GuidedStep
from kernels.rows import NetworkInput

RESULTS = Path(__file__).parent / "results"
SHAPE = (4, 64, 64)
LATENT, NETWORK = 4, 2  # bytes a value
COPY_BYTES = 2**30  # far more than a cache holds
# Memory bandwidth, bytes a second, of their data sheets. A copy reaches about nine tenths of it.
BANDWIDTHS = {"A100 80GB": 2.039e12, "H100 SXM": 3.35e12, "H200": 4.8e12}
CALLS = 20  # a measurement: one launch is over before a clock of the host has ticked

# Values an element of the latents, read and written once: (of the latents' dtype, of the networks').
LAUNCHES = {
    "clean": (1, 2 + 1),  # z; u, c, x
    "update": (2, 2 + 1 + 2),  # z, z'; u, c, g, two rows
    "update with noise": (2, 2 + 1 + 2),  # the noise is made where it is used
    "push": (3, 1 + 1),  # push, z0hat, push'; g, x
}


def moved(launch: str, batch: int) -> int:
    """Bytes that must move; an image's length, its id and the coefficients are not counted."""
    latent, network = LAUNCHES[launch]
    return batch * SHAPE[0] * SHAPE[1] * SHAPE[2] * (latent * LATENT + network * NETWORK)


def calls_of(step: GuidedStep, batch: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """By launch, a call on tensors of its own."""
    order = torch.channels_last

    def normal(rows: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(rows, *SHAPE, device=device).to(dtype).to(memory_format=order)

    z, push, clean = (normal(batch, torch.float32) for _ in range(3))
    model, gradient = normal(2 * batch, torch.float16), normal(batch, torch.float16)
    row, length = torch.rand(8, device=device), torch.ones(batch, device=device)
    unet, decoder = NetworkInput(torch.float16, order), NetworkInput(torch.float16, order, 0.18215)
    update = partial(
        step.update, z, model, row, batch, 2, gradient=gradient, length=length, network=unet, next_copies=2
    )
    return {
        "clean": partial(step.clean, z, model, row, batch, 2, decoder, False),
        "update": update,
        "update with noise": partial(update, noise=(7, torch.arange(batch, device=device), 3)),
        "push": partial(step.push, push, gradient, length, "rms", 1.0, clean, decoder, batch, 1),
    }


def compiled(step: GuidedStep) -> GuidedStep:
    return GuidedStep(*(torch.compile(f, dynamic=False) for f in (step.clean, step.push, step.update)))


def bench(batches: list[int], turns: int, device: torch.device) -> dict[str, Any]:
    """Rows of the table, and what could not be run, with the reason."""
    source = torch.empty(COPY_BYTES // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ways = {
        "triton": GUIDED_STEPS["triton"],
        "eager": GUIDED_STEPS["torch"],
        "compile": compiled(GUIDED_STEPS["torch"]),
    }
    rows, failures, copies = [], [], []
    for batch in batches:
        made = {way: calls_of(step, batch, device) for way, step in ways.items()}
        for launch in LAUNCHES:
            calls = {way: repeated(made[way][launch]) for way in ways} | {
                "copy": repeated(lambda: target.copy_(source))
            }
            with torch.no_grad():
                seconds, failed = in_turns(calls, turns, device)
            failures += [{"batch": batch, "launch": launch, "way": way, "why": why} for way, why in failed.items()]
            copy = [COPY_BYTES * CALLS / s for s in seconds["copy"]]
            copies += copy
            for way in ways:
                if way in failed:
                    continue
                speed = [moved(launch, batch) * CALLS / s for s in seconds[way]]
                eager = seconds.get("eager")
                found = {
                    "batch": batch, "launch": launch, "way": way,
                    "microseconds": 1e6 * median(seconds[way]) / CALLS,
                    "bytes": moved(launch, batch), "bytes_per_second": median(speed),
                    "share_of_copy": median(s / c for s, c in zip(speed, copy, strict=True)),
                    "ratio": median(e / s for e, s in zip(eager, seconds[way], strict=True)) if eager else None,
                }  # fmt: skip
                rows.append(found)
    return {"turns": turns, "copy_bytes_per_second": median(copies), "rows": rows, "failures": failures}


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def floors(batches: list[int]) -> list[dict[str, Any]]:
    """Microseconds that no launch can be quicker than, at the bandwidths of data sheets."""
    return [
        {"batch": batch, "launch": launch, "MB": round(moved(launch, batch) / 1e6, 1)}
        | {f"us on {name}": round(1e6 * moved(launch, batch) / speed, 1) for name, speed in BANDWIDTHS.items()}
        for batch in batches
        for launch in LAUNCHES
    ]


def resources() -> list[dict[str, Any]]:
    """In a process of its own: here the kernels may be interpreted, which leaves nothing to compile."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernel_resources"]
    done = subprocess.run(command, cwd=RESULTS.parents[1], env=env, capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def markdown(result: dict[str, Any]) -> str:
    heads = ["batch", "launch", "way", "us", "MB", "GB/s", "of a copy", "ratio to eager"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in result["rows"]:
        cells = [r["batch"], r["launch"], r["way"], f"{r['microseconds']:.1f}", f"{r['bytes'] / 1e6:.1f}"]
        cells += [f"{r['bytes_per_second'] / 1e9:.0f}", f"{100 * r['share_of_copy']:.0f} %"]
        cells += ["-" if r["ratio"] is None else f"{r['ratio']:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", *(f"Not measured: {f['launch']} by {f['way']}: {f['why']}" for f in result["failures"])]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="8,64,512", help="images, comma-separated (default 8,64,512)")
    parser.add_argument("--repeats", type=int, default=11, help="turns (default 11)")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/guided_step-<device>.json")
    a = parser.parse_args()
    batches = [int(word) for word in a.batches.split(",")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {"machine": describe(device), "floors": floors(batches), "resources": resources()}
    print(resources_table(result["floors"]), "", resources_table(result["resources"]), sep="\n", file=sys.stderr)
    if device.type == "cuda":
        result |= bench(batches, a.repeats, device)
        print("", markdown(result), sep="\n", file=sys.stderr)
        if a.record:
            name = "-".join(result["machine"]["device"].lower().split())
            replace_text(RESULTS / f"guided_step-{name}.json", json.dumps(result, indent=1) + "\n")
    else:
        result["not_measured"] = "no GPU: neither times nor the copy's bandwidth, and so no share and no ratio"
        print("", f"Not measured: {result['not_measured']}.", sep="\n", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
