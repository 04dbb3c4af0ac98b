"""Steps of distillation, one way to compute them a row: images per second, share of the peak, student accuracy.

    python -m benchmarks.bench_distill                          the demo's networks on a CPU, under ten minutes
    python -m benchmarks.bench_distill --accuracy --teacher runs/demo/teacher --data runs/demo/synthetic
    python -m benchmarks.bench_distill --pairs resnet34:resnet18:32:256 --device cuda

eager          float32, tensors contiguous, the teacher asked in every step: what the others are compared with
channels_last  as dfkd-distill has it: NHWC networks and images
bf16, fp16     --amp; fp16 on a GPU alone
compile        --compile default
cuda graph     --cuda-graph, on a GPU alone
cached logits  --cache-logits on: the teacher is not asked
all            --amp bf16, compiled and cached; on a GPU as a CUDA graph too

Rows but the first are channels_last. Images lie on the device ready: a loader's work is not in these steps. Ways run in
turns in one process, ratios are taken within a turn. FLOP are those that the row computes: cached rows have fewer.
--accuracy distils the demo's images with each row's options (a cached row without views and mixtures, which it cannot
have) and tests the student on the demo's test images.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import in_turns, matmuls, peak, reason
from benchmarks.machine import describe, name_of
from benchmarks.quality import DATA, call
from dfkd import teachers
from dfkd.runtime import resolve_device
from dfkd.training.checks import AMP_DTYPES, check_computation
from dfkd.training.settings import DistillSettings
from dfkd.training.state import State
from dfkd.training.step import Step
from dfkd.training.world import World
from dfkd.errors import UsageError
from dfkd.files import replace_text
from dfkd.runtime import choose_kernels

RESULTS = Path(__file__).parent / "results"
CLASSES = 10
PLAIN = {"augment": "none", "mix": "none", "cache_logits": "on"}


@dataclass(frozen=True)
class Way:
    """changes: of DistillSettings; layout: of networks and images."""

    changes: dict[str, Any] = field(default_factory=dict)
    layout: torch.memory_format = torch.channels_last


def ways(device: torch.device) -> dict[str, Way]:
    graph = {"cuda_graph": True} if device.type == "cuda" else {}
    return {
        "eager": Way(layout=torch.contiguous_format),
        "channels_last": Way(),
        "bf16": Way({"amp": "bf16"}),
        "fp16": Way({"amp": "fp16"}),
        "compile": Way({"compile": "default"}),
        "cuda graph": Way({"cuda_graph": True}),
        "cached logits": Way(PLAIN),
        "all": Way({"amp": "bf16", "compile": "default", **PLAIN, **graph}),
    }


@dataclass(frozen=True)
class Pair:
    """A teacher and a student of the zoo, the side of their images, the images of a step."""

    teacher: str
    student: str
    size: int
    batch: int

    def __str__(self) -> str:
        return f"{self.teacher} to {self.student}, {self.size}x{self.size}, {self.batch} images a step"


def pair(text: str) -> Pair:
    try:
        teacher, student, size, batch = text.split(":")
        found = Pair(teacher, student, int(size), int(batch))
        for name in (teacher, student):
            teachers.check(name)
    except (ValueError, UsageError) as error:
        raise argparse.ArgumentTypeError(f"{text}: want TEACHER:STUDENT:SIZE:BATCH ({error})") from None
    return found


def made(way: Way, of: Pair, device: torch.device) -> Callable[[], Tensor]:
    """A call that makes one step, on weights and images of its own. Raises UsageError where it cannot be had here."""
    settings = DistillSettings(batch_size=of.batch, lr=1e-3, temperature=4.0, **{"augment": "none", **way.changes})
    world = World(device)
    check_computation(settings, world)
    torch.manual_seed(0)
    networks: list[nn.Module] = [teachers.build(name, CLASSES) for name in (of.teacher, of.student)]
    teacher, student = (n.to(device).to(memory_format=way.layout) for n in networks)  # type: ignore[call-overload]
    images = torch.randn(of.batch, 3, of.size, of.size, device=device).to(AMP_DTYPES[settings.amp])
    images = images.contiguous(memory_format=way.layout)
    labels = torch.randint(CLASSES, (of.batch,), device=device)
    state = State(student.train(), settings, device)
    step = Step(teacher.eval(), state, settings, world, of.batch, choose_kernels("auto", device).name)
    wanted = torch.randn(of.batch, CLASSES, device=device) if settings.cache_logits == "on" else None
    return partial(step, images, labels, wanted, 1e-3)


def flop(of: Pair, cached: bool) -> int:
    """Of one step: the student's forward and backward pass, and the teacher's forward unless it is cached."""
    step = made(Way(PLAIN if cached else {}), replace(of, batch=2), torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() * of.batch // 2


def several(step: Callable[[], Tensor], count: int) -> None:
    for _ in range(count):
        step()


def bench(of: Pair, device: torch.device, steps: int, turns: int, names: list[str]) -> dict[str, Any]:
    """Rows of one pair, and why of what could not run."""
    calls: dict[str, Callable[[], object]] = {}
    compile_seconds, failures = {}, {}
    for name, way in ways(device).items():
        if name not in names:
            continue
        try:
            step = made(way, of, device)
            started = time.perf_counter()
            several(step, 5)  # compiles, and captures after three
            if way.changes.get("compile"):
                compile_seconds[name] = time.perf_counter() - started
            calls[name] = partial(several, step, steps)
        except Exception as error:  # such as no compiler: the other ways are measured still
            failures[name] = str(error) if isinstance(error, UsageError) else reason(error)
        print(f"{of} {name}: {failures.get(name, 'ready')}", file=sys.stderr, flush=True)
    ceilings = matmuls(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    ceiling = "bfloat16" if device.type == "cuda" else "float32"
    seconds, failed = in_turns({**calls, "matmul": ceilings[ceiling][0]}, turns, device)
    limit = [ceilings[ceiling][1] / s for s in seconds.pop("matmul")]
    most = peak(device, torch.bfloat16)
    work = {cached: flop(of, cached) * steps for cached in (False, True)}
    rows = {}
    for name, spent in seconds.items():
        speeds = [work["logits" in name or name == "all"] / s for s in spent]
        base = seconds.get("eager")
        rows[name] = {
            "images_per_second": of.batch * steps / median(spent),
            "slowest": of.batch * steps / max(spent),
            "fastest": of.batch * steps / min(spent),
            "ratio": median(b / s for b, s in zip(base, spent, strict=True)) if base else None,
            "flop_per_second": median(speeds),
            "share_of_matmul": median(speed / top for speed, top in zip(speeds, limit, strict=True)),
            "share_of_peak": median(speeds) / most if most else None,
            "compile_seconds": compile_seconds.get(name),
        }
    return {"pair": vars(of), "rows": rows, "matmul": ceiling, "failures": {**failures, **failed}}


def accuracies(a: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, float | None]:
    """Test accuracy of a student of the demo per row; None for eager, which dfkd-distill has no option for."""
    teacher, data = a.teacher, a.data
    if teacher is None:
        teacher = folder / "teacher"
        call("dfkd-train-teacher", "--preset", "demo", "--seed", a.seed, "--out", teacher)
    common = ["--preset", "demo", "--teacher-checkpoint", teacher, "--seed", a.seed, "--device", device]
    if data is None:
        data = folder / "synthetic"
        call("dfkd-generate", *common, "--out", data)
    found: dict[str, float | None] = {}
    for name, way in ways(device).items():
        if name == "eager" or name not in a.ways or (device.type == "cpu" and name in ("fp16", "cuda graph")):
            continue
        words: list[object] = []
        for key, value in way.changes.items():
            words += ["--" + key.replace("_", "-"), *([] if value is True else [value])]
        out, test = folder / name.replace(" ", "-"), ["--test", DATA, "--test-split", a.split]
        found[name] = float(call("dfkd-distill", *common, "--data", data, "--out", out, *test, *words)["accuracy"])
    return found


def markdown(result: dict[str, Any]) -> str:
    """The table of a recorded result."""
    heads = [
        "networks",
        "way",
        "img/s: median (min to max)",
        "ratio",
        "of matmul",
        "of peak",
        "compile s",
        "demo's student",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    missing = []
    for part in result["pairs"]:
        of = Pair(**part["pair"])
        for name, row in part["rows"].items():
            accuracy = result["student_accuracy"].get(name) if part is result["pairs"][0] else None
            cells = [
                f"{of.teacher} to {of.student}, {of.size}", name,
                f"{row['images_per_second']:.0f} ({row['slowest']:.0f} to {row['fastest']:.0f})",
                *(_or_dash(row["ratio"], "{:.2f}"), _percent(row["share_of_matmul"]), _percent(row["share_of_peak"])),
                *(_or_dash(row["compile_seconds"], "{:.0f}"), _or_dash(accuracy and 100 * accuracy, "{:.1f} %")),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        where = f"{of.teacher} to {of.student}, {of.size}"
        missing += [f"- {name} ({where}): {why}" for name, why in part["failures"].items()]
    machine = result["machine"]
    matmul = result["pairs"][0]["matmul"]
    lines += [
        "",
        f"A step of {', '.join(str(p['pair']['batch']) for p in result['pairs'])} images; ratio: to eager; matmul: a "
        f"square {matmul} one here; student: of the demo in this way, with cached logits without views and mixtures. "
        f"{result['turns']} turns, {machine['device']}, {machine['threads']} threads, torch "
        f"{machine['versions']['torch']}, {machine['date']}: `python -m benchmarks.bench_distill --accuracy`.",
    ]
    return "\n".join([*lines, *(["", "Not measured:", "", *missing] if missing else [])])


def _percent(value: float | None) -> str:
    return _or_dash(value and 100 * value, "{:.0f} %")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def defaults(device: torch.device, quick: bool) -> list[Pair]:
    if quick:
        return [Pair("resnet8_half", "resnet8_half", 32, 8)]
    if device.type == "cpu":
        return [Pair("resnet8_half", "resnet8_half", 32, 128), Pair("resnet20", "resnet8", 32, 128)]
    return [Pair("resnet34", "resnet18", 32, 256), Pair("resnet34_imagenet", "resnet18_imagenet", 224, 256)]


def way_names(text: str) -> list[str]:
    known = list(ways(torch.device("cpu")))
    found = text.split(",")
    if unknown := [name for name in found if name not in known]:
        raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; known are {', '.join(known)}")
    return found


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=pair, nargs="+", help="TEACHER:STUDENT:SIZE:BATCH of the zoo")
    parser.add_argument("--ways", type=way_names, default=list(ways(torch.device("cpu"))), help="default all")
    parser.add_argument("--steps", type=int, default=4, help="of a turn (default 4)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default 5)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="one turn of one small step: proves that it runs")
    parser.add_argument("--accuracy", action="store_true", help="also distil and test a student per row")
    parser.add_argument("--teacher", type=Path, help="folder of dfkd-train-teacher --preset demo; trained when absent")
    parser.add_argument("--data", type=Path, help="folder of dfkd-generate --preset demo; made when absent")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/distill-<device>.json")
    return parser


def main() -> None:
    a = arguments_parser().parse_args()
    try:
        device = resolve_device(a.device)
    except UsageError as error:
        sys.exit(f"error: {error}")
    machine = describe(device)
    if a.quick:
        a.steps = a.repeats = 1
    pairs = a.pairs or defaults(device, a.quick)
    result: dict[str, Any] = {"machine": machine, "turns": a.repeats, "pairs": [], "student_accuracy": {}}
    for of in pairs:
        result["pairs"].append(bench(of, device, a.steps, a.repeats, a.ways))
        print(json.dumps(result), flush=True)  # for who stops it; the last line is the whole
    if a.accuracy:
        with tempfile.TemporaryDirectory() as folder:
            result["student_accuracy"] = accuracies(a, device, Path(folder))
    print(markdown(result), file=sys.stderr)
    if a.record:
        kind = "cpu" if device.type == "cpu" else name_of(machine)
        replace_text(RESULTS / f"distill-{kind}.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
