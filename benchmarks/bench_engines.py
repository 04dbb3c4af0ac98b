"""Eager, channels_last, torch.compile and the stored backends: every network of a run at several micro-batches.

    python -m benchmarks.bench_engines --teacher runs/demo/teacher                        the demo's networks, CPU
    python -m benchmarks.bench_engines --teacher T --device cuda --dtype fp16 --rows 16,64 \\
        --prior stable-diffusion-v1-5/stable-diffusion-v1-5 --generate "--size 512"
    python -m benchmarks.bench_engines --sd15 512 --device cuda --dtype fp16 --rows 4,16  random weights, no download

Networks are those of dfkd/engines/functions.py with the losses of the `demo` preset. All ways to run one are timed in
turns in one process, with a square matmul in every turn; ratios to eager and shares of the matmul are taken within a
turn, and the table has their medians. An engine is compiled once, planned for the largest of --rows. Errors are against
eager float64 (engine/parity.py), on a few rows. What cannot run is listed with its reason.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.engine_ways import WAYS, Way, make_ways, without_grad
from benchmarks.flops import counted, in_turns, matmuls, peak, precision, reason
from benchmarks.machine import describe, name_of
from benchmarks.quality import call
from dfkd.config import DTYPES
from dfkd.cli.generate_options import GenerateOptions
from dfkd.cli.options import parse
from dfkd.cli.prepare import TORCH_DTYPES
from dfkd.compiled.functions import NETWORKS, Sources, function, samples
from dfkd.compiled.sources import load_sources
from dfkd.errors import UsageError
from dfkd.files import replace_text
from dfkd.presets import PRESETS
from dfkd_engine.attention import set_attention
from dfkd_engine.backends import BACKENDS
from dfkd_engine.errors import EngineError
from dfkd_engine.parity import measure

RESULTS = Path(__file__).parent / "results"
SEED = 0
JUDGED_ROWS = 2  # a 512-pixel decoder's float64 activations and their gradients take 12 GB an image


def bench(
    sources: Sources,
    networks: Sequence[str],
    names: Sequence[str],
    rows: Sequence[int],
    turns: int,
    so_far: Callable[[dict[str, Any]], object] = lambda found: None,
) -> dict[str, Any]:
    """The result without the machine: measurements one by one, "rows", and what could not be run, "failures".

    so_far: is given, after every network, what would be returned if it were the last.
    """
    device, dtype = sources.prior.device, sources.prior.dtype
    result: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "precision": precision(device, dtype),
        "peak_flop_per_second": peak(device, dtype),
        "prior": sources.prior.source,
        "teacher": sources.teacher.architecture if sources.teacher else None,
        "image_size": sources.prior.vae_scale_factor * sources.latent_size[0],
        "turns": turns,
        "planned_rows": max(rows),
        "versions": {name: own.versions() for name, own in BACKENDS.items() if name in names},
        "matmul_flop_per_second": {},
        "rows": [],
        "failures": [],
    }
    speeds: dict[str, list[float]] = {}
    for network in networks:
        try:
            with tempfile.TemporaryDirectory() as folder:
                _bench_network(result, speeds, network, sources, tuple(names), rows, Path(folder))
        except Exception as error:  # such as too little memory for float64: the other networks are measured still
            result["failures"].append({"network": network, "rows": None, "backend": "all", "why": reason(error)})
            _say(f"{network}: {reason(error)}")
        result["matmul_flop_per_second"] = {name: median(found) for name, found in speeds.items()}
        so_far(result)
    return result


def _bench_network(
    result: dict[str, Any],
    speeds: dict[str, list[float]],
    network: str,
    sources: Sources,
    names: tuple[str, ...],
    rows: Sequence[int],
    folder: Path,
) -> None:
    device = sources.prior.device
    judge = Judge(network, sources)
    ways = {}
    for way in make_ways(names, network, sources, max(rows), folder):
        if way.call is None:
            result["failures"].append({"network": network, "rows": None, "backend": way.name, "why": way.why})
        else:
            ways[way.name] = way, judge(way)
        _say(f"{network} {way.name}: {way.why or 'ready'}")
    ceilings = matmuls(device, sources.prior.dtype)
    for count in rows:
        arguments = samples(network, sources, count, SEED)
        calls = {name: partial(way.call, *arguments) for name, (way, _) in ways.items()}
        matmul = {f"{name} matmul": run for name, (run, _) in ceilings.items()}
        seconds, failed = in_turns(calls | matmul, result["turns"], device)
        for name, (_, flop) in ceilings.items():
            speeds.setdefault(name, []).extend(flop / s for s in seconds[f"{name} matmul"])
        limit = ceilings[result["precision"]][1]
        ceiling = [limit / s for s in seconds[f"{result['precision']} matmul"]]
        for name, (way, quality) in ways.items():
            here = {"network": network, "rows": count, "backend": name}
            if name in failed:
                result["failures"].append(here | {"why": failed[name]})
                continue
            speed = row(seconds[name], seconds.get("eager"), count * judge.flop_per_row, ceiling)
            result["rows"].append(here | speed | {"compile_seconds": way.compile_seconds} | quality)
            _say(f"{network} {count} rows {name}: {speed['ms']:.1f} ms")


def row(seconds: list[float], eager: list[float] | None, flop: float, ceiling: list[float]) -> dict[str, Any]:
    """Numbers of one way at one batch, medians over turns; `eager` and `ceiling` (FLOP/s) are of the same turns."""
    speeds = [flop / s for s in seconds]
    return {
        "ms": 1000 * median(seconds),
        "fastest_ms": 1000 * min(seconds),
        "slowest_ms": 1000 * max(seconds),
        "turns_ms": [1000 * s for s in seconds],
        "ratio": median(e / s for e, s in zip(eager, seconds, strict=True)) if eager else None,
        "flop": flop,
        "flop_per_second": median(speeds),
        "share_of_matmul": median(speed / limit for speed, limit in zip(speeds, ceiling, strict=True)),
    }


class Judge:
    """A network's float64 results on a few rows, by eager autograd; the same run counts its FLOP."""

    def __init__(self, network: str, sources: Sources) -> None:
        made = function(network, sources)
        self.kind, self.dtype = made.kind, str(sources.prior.dtype).removeprefix("torch.")
        self.eager = without_grad(made.call)
        self.arguments = samples(network, sources, JUDGED_ROWS, SEED + 1)
        exact = sources.doubled()
        for part in (exact.prior.unet, exact.prior.vae):
            set_attention(part, "sdpa")  # xformers has no float64
        doubles = (x.double() if x.is_floating_point() else x for x in self.arguments)
        self.want, flop = counted(function(network, exact).call, *doubles)
        self.flop_per_row = flop / JUDGED_ROWS

    def __call__(self, way: Way) -> dict[str, Any]:
        """relative_error and cosine, the worst of all results and rows; None where `quality` says why."""
        try:
            found = measure(way.call, lambda *_: self.want, self.eager, [self.arguments], self.kind, self.dtype)
        except EngineError as error:
            return {"relative_error": None, "cosine": None, "quality": str(error)}
        note = f"{found.kinks} of {JUDGED_ROWS} rows sit on a kink" if found.kinks else None
        return {"relative_error": found.relative, "cosine": found.cosine, "quality": note}


def markdown(result: dict[str, Any]) -> str:
    """The table of a recorded result, with what could not run below it."""
    heads = ["network", "rows", "backend", "ms: median (min to max)", "ratio", "FLOP", "FLOP/s", "of matmul", "error"]
    heads += ["compile s"]
    limit = result.get("peak_flop_per_second")
    heads += ["MFU"] if limit else []
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in result["rows"]:
        cells = [
            r["network"], r["rows"], r["backend"],
            f"{r['ms']:.1f} ({r['fastest_ms']:.1f} to {r['slowest_ms']:.1f})",
            _or_dash(r["ratio"], "{:.2f}"), _giga(r["flop"]), _giga(r["flop_per_second"]),
            f"{100 * r['share_of_matmul']:.0f} %", _or_dash(r["relative_error"], "{:.1e}"),
            _or_dash(r["compile_seconds"], "{:.0f}"),
        ]  # fmt: skip
        cells += [f"{100 * r['flop_per_second'] / limit:.0f} %"] if limit else []
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    machine = result["machine"]
    ceilings = ", ".join(f"{name} {_giga(speed)}FLOP/s" for name, speed in result["matmul_flop_per_second"].items())
    size, turns = result["image_size"], result["turns"]
    lines += [
        "",
        f"Networks in {result['dtype']}, images {size}x{size}, teacher {result['teacher']}; ratio: times as fast as "
        f"eager; matmul: {result['precision']} (measured: {ceilings}); error: against float64. {turns} turns, "
        f"{machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}, {machine['date']}: "
        "`python -m benchmarks.bench_engines`.",
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    for f in result["failures"]:
        where = f["network"] + (f" at {f['rows']} rows" if f["rows"] else "")
        reasons.setdefault((f["backend"], f["why"]), []).append(where)
    for r in result["rows"]:
        if r["relative_error"] is None:
            where = reasons.setdefault((f"error of {r['backend']}", r["quality"]), [])
            where += [r["network"]] if r["network"] not in where else []
    if reasons:
        lines += ["", "Not measured:", ""]
        lines += [f"- {name} ({', '.join(where)}): {why}" for (name, why), where in reasons.items()]
    return "\n".join(lines)


def _giga(value: float) -> str:
    size, prefix = next(((s, p) for s, p in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if value >= s), (1e3, "k"))
    return f"{value / size:.{max(0, 3 - len(str(int(value / size))))}f} {prefix}"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _names(known: Sequence[str]) -> Any:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; known are {', '.join(known)}")
        return found

    return names


def _rows(text: str) -> list[int]:
    found = [int(word) for word in text.split(",")]
    if min(found) < 2:
        raise argparse.ArgumentTypeError("compiled code takes 2 rows or more; an engine runs 1 as 2")
    return found


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="folder of dfkd-train-teacher; trained here when absent")
    parser.add_argument("--prior", help="folder or hub id (default: the embedded prior)")
    parser.add_argument("--sd15", type=int, metavar="SIZE", help="Stable Diffusion 1.5 at this size, random weights")
    parser.add_argument("--thin", action="store_true", help="of --sd15, with few channels: a rehearsal, never recorded")
    parser.add_argument("--rows", type=_rows, default=[25, 100, 200], help="micro-batches (default 25,100,200)")
    parser.add_argument("--backends", type=_names(WAYS), default=list(WAYS), help=f"default {','.join(WAYS)}")
    networks = ["unet", "decode", "gradient", "pixel_gradient"]
    text = f"of {', '.join(NETWORKS)} (default {','.join(networks)})"
    parser.add_argument("--networks", type=_names(NETWORKS), default=networks, help=text)
    parser.add_argument("--repeats", type=int, default=5, help="turns (default 5)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the networks (default fp32)")
    parser.add_argument("--generate", default="", help="more options of dfkd-generate, as one string")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/engines-<device>.json")
    return parser


def sd15_sources(a: argparse.Namespace) -> Sources:
    """Networks of Stable Diffusion 1.5's sizes with random weights, and a ResNet-34."""
    from benchmarks import sd15  # it needs diffusers, which a machine that measures kernels may lack

    return sd15.placed(sd15.make_sources(a.sd15, a.thin), torch.device(a.device), TORCH_DTYPES[a.dtype])


def run_sources(a: argparse.Namespace) -> Sources:
    """The networks of a dfkd-generate with these options."""
    with tempfile.TemporaryDirectory() as scratch:
        if a.teacher is None:
            a.teacher = Path(scratch) / "teacher"
            call("dfkd-train-teacher", "--preset", "demo", "--out", a.teacher)
        words = ["--preset", "demo", "--teacher-checkpoint", str(a.teacher), "--device", a.device, "--dtype", a.dtype]
        words += ["--out", scratch, *(["--prior", a.prior] if a.prior else []), *shlex.split(a.generate)]
        try:
            return load_sources(parse(GenerateOptions, words, "dfkd-generate", PRESETS), a.networks)
        except UsageError as error:
            sys.exit(f"error: {error}")


def main() -> None:
    a = arguments_parser().parse_args()
    if a.thin and (a.record or not a.sd15):
        sys.exit("error: --thin is of --sd15, and not recorded")
    sources = sd15_sources(a) if a.sd15 else run_sources(a)
    machine = describe(sources.prior.device)  # before the work: what fails here must not lose it

    def so_far(found: dict[str, Any]) -> None:
        """A line for who stops it; the last one is the whole."""
        print(json.dumps({"machine": machine, **found}), flush=True)

    result = {"machine": machine, **bench(sources, a.networks, a.backends, a.rows, a.repeats, so_far)}
    print(markdown(result), file=sys.stderr)
    if a.record:
        kind = "cpu" if sources.prior.device.type == "cpu" else name_of(machine)
        dtype = "" if a.dtype == "fp32" else f"-{a.dtype}"
        prior = f"-sd15-{a.sd15}" if a.sd15 else ""
        replace_text(RESULTS / f"engines-{kind}{dtype}{prior}.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
