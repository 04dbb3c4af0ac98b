"""Steps of distillation, one way to compute them a row: images per second, share of the peak, student accuracy.

    python -m benchmarks.bench_distill                          the demo's networks on a CPU, minutes
    python -m benchmarks.bench_distill --accuracy runs/demo     after dfkd-run --preset demo: also a student a row
    python -m benchmarks.bench_distill --pairs resnet34:resnet18:32:256 --device cuda

eager          float32, tensors contiguous: what the others are compared with
channels_last  as dfkd-distill has it: NHWC networks and images
bf16, fp16     --amp; fp16 on a GPU alone
compile        --compile default
cuda graph     --cuda-graph, on a GPU alone
all            --amp bf16 and compiled; on a GPU as a CUDA graph too

Rows but the first are channels_last. Images lie on the device ready: a loader's work is not in these steps. Ways run in
turns in one process, ratios are taken within a turn. --accuracy distils the run's images with each row's options and
tests the student on the demo's test images.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import in_turns, matmuls, peak, reason
from benchmarks.machine import describe
from benchmarks.recording import finish, names_of, not_measured, number, percent, ratios, spread, table, taken_on, words
from dfkd import teachers
from dfkd.config import DistillConfig
from dfkd.errors import UsageError
from dfkd.runtime import resolve_device
from dfkd.training.distill import check
from dfkd.training.losses import KullbackLeibler, Objective
from dfkd.training.state import State
from dfkd.training.step import AMP_DTYPES, Step, autocast, compiled
from dfkd.training.world import World

CLASSES = 10
WAYS: Mapping[str, Mapping[str, Any]] = {  # what a row changes in the settings
    "eager": {},
    "channels_last": {},
    "bf16": {"amp": "bf16"},
    "fp16": {"amp": "fp16"},
    "compile": {"compile": "default"},
    "cuda graph": {"cuda_graph": True},
    "all": {"amp": "bf16", "compile": "default"},
}


def changes(way: str, device: torch.device) -> dict[str, Any]:
    return {**WAYS[way], **({"cuda_graph": True} if way == "all" and device.type == "cuda" else {})}


@dataclass(frozen=True)
class Pair:
    """A teacher and a student of the zoo, the side of their images, the images of a step."""

    teacher: str
    student: str
    size: int
    batch: int

    @classmethod
    def of(cls, text: str) -> "Pair":
        """From TEACHER:STUDENT:SIZE:BATCH; raises ArgumentTypeError."""
        try:
            teacher, student, size, batch = text.split(":")
            for name in (teacher, student):
                teachers.check(name)
            return cls(teacher, student, int(size), int(batch))
        except (ValueError, UsageError) as error:
            raise argparse.ArgumentTypeError(f"{text}: want TEACHER:STUDENT:SIZE:BATCH ({error})") from None

    def __str__(self) -> str:
        return f"{self.teacher} to {self.student}, {self.size}"


def step_of(
    config: DistillConfig, teacher: str, device: torch.device, order: torch.memory_format = torch.channels_last
) -> Step:
    """A step of dfkd-distill on networks with random weights, their weights in this order.

    Raises UsageError where the settings cannot be had on the device.
    """
    world, compute = World(device), config.train.compute
    kernels = check(config, world).name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: list[nn.Module] = [teachers.build(name, CLASSES) for name in (teacher, config.student)]
    theirs, ours = (n.to(device).to(memory_format=order) for n in made)  # type: ignore[call-overload]
    losses = [KullbackLeibler(temperature=config.temperature, kernels=kernels)]
    call_teacher = compiled(theirs.eval(), compute.compile)
    objective = Objective(theirs, ours, losses, autocast(compute.amp, device), call_teacher)
    return Step(objective, State(ours.train(), config.train, device), config.train, world)


def made(way: str, of: Pair, device: torch.device) -> Callable[[], Tensor]:
    """A call that makes one step, on weights and images of its own. Raises UsageError where it cannot be had here."""
    order = torch.contiguous_format if way == "eager" else torch.channels_last
    config = DistillConfig.of(
        student=of.student, batch_size=of.batch, steps=1, lr=1e-3, temperature=4.0, **changes(way, device)
    )
    step = step_of(config, of.teacher, device, order)
    images = torch.randn(of.batch, 3, of.size, of.size, device=device).to(AMP_DTYPES[config.train.compute.amp])
    labels = torch.randint(CLASSES, (of.batch,), device=device)
    return partial(step, images.contiguous(memory_format=order), labels, 1e-3)


def flop(of: Pair) -> int:
    """Of one step: the teacher's forward pass, and the student's forward and backward pass."""
    step = made("channels_last", replace(of, batch=2), torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() * of.batch // 2


def several(step: Callable[[], Tensor], count: int) -> None:
    for _ in range(count):
        step()


def bench(of: Pair, device: torch.device, steps: int, turns: int, names: Sequence[str]) -> dict[str, Any]:
    """Rows of one pair, and why of what could not run."""
    calls: dict[str, Callable[[], object]] = {}
    compiling, failures = {}, {}
    for name in names:
        try:
            step = made(name, of, device)
            started = time.perf_counter()
            several(step, 5)  # compiles, and captures after three
            if "compile" in WAYS[name]:
                compiling[name] = time.perf_counter() - started
            calls[name] = partial(several, step, steps)
        except Exception as error:  # such as no compiler: the other ways are measured still
            failures[name] = str(error) if isinstance(error, UsageError) else reason(error)
        print(f"{of} {name}: {failures.get(name, 'ready')}", file=sys.stderr, flush=True)
    ceiling = "bfloat16" if device.type == "cuda" else "float32"
    matmul, work = matmuls(device, getattr(torch, ceiling))[ceiling]
    seconds, failed = in_turns({**calls, "matmul": matmul}, turns, device)
    limit, most, whole = [work / s for s in seconds.pop("matmul")], peak(device, torch.bfloat16), flop(of) * steps
    rows = {}
    for name, spent in seconds.items():
        rows[name] = {
            "images_per_second": spread([of.batch * steps / s for s in spent]),
            "ratio": ratios(seconds.get("eager"), spent),
            "flop_per_second": whole / median(spent),
            "share_of_matmul": median(whole / s / top for s, top in zip(spent, limit, strict=True)),
            "share_of_peak": whole / median(spent) / most if most else None,
            "compile_seconds": compiling.get(name),
        }
    return {"pair": vars(of), "rows": rows, "matmul": ceiling, "failures": {**failures, **failed}}


def accuracies(run: Path, names: Sequence[str], device: torch.device, folder: Path) -> dict[str, float]:
    """Test accuracy of a student of a dfkd-run of the demo by way; none for eager, which dfkd-distill is not."""
    from dfkd.evaluation import evaluate
    from dfkd.training.distill import distill

    teacher, found = teachers.Classifier.from_pretrained(run / "teacher"), {}
    for name in (name for name in names if name != "eager"):
        try:
            config = DistillConfig.preset("demo", device=str(device), **changes(name, device))
            student = distill(run / "synthetic", teacher, config, folder / name)
        except UsageError:  # for the reason that its row has
            continue
        found[name] = evaluate(student, "digits-on-photos").accuracy
    return found


def markdown(result: dict[str, Any]) -> str:
    """The table of a recorded result."""
    heads = ["networks", "way", "img/s: median (min to max)", "ratio", "of matmul", "MFU", "compile s", "student"]
    cells, missing = [], []
    for number_of, part in enumerate(result["pairs"]):
        of = Pair(**part["pair"])
        for name, r in part["rows"].items():
            seconds, accuracy = r["compile_seconds"], None if number_of else result["student_accuracy"].get(name)
            cells.append([
                of, name, words(r["images_per_second"]), r["ratio"] and number(r["ratio"]["median"]),
                percent(r["share_of_matmul"]), percent(r["share_of_peak"]), seconds and number(seconds),
                accuracy and f"{100 * accuracy:.1f} %",
            ])  # fmt: skip
        missing += [(f"{name} ({of})", why) for name, why in part["failures"].items()]
    batches = ", ".join(str(part["pair"]["batch"]) for part in result["pairs"])
    under = (
        f"A step of {batches} images; ratio: to eager; matmul: a square {result['pairs'][0]['matmul']} one here; "
        f"student: of the demo in this way. {result['turns']} turns, "
    )
    command = "python -m benchmarks.bench_distill --accuracy runs/demo"
    return "\n".join([*table(heads, cells), "", under + taken_on(result["machine"], command), *not_measured(missing)])


def defaults(device: torch.device, quick: bool = False) -> list[Pair]:
    if quick:
        return [Pair("resnet8_half", "resnet8_half", 32, 8)]
    if device.type == "cpu":
        return [Pair("resnet8_half", "resnet8_half", 32, 128), Pair("resnet20", "resnet8", 32, 128)]
    return [Pair("resnet34", "resnet18", 32, 256), Pair("resnet34_imagenet", "resnet18_imagenet", 224, 256)]


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Pair.of, nargs="+", help="TEACHER:STUDENT:SIZE:BATCH of the zoo")
    parser.add_argument("--ways", type=names_of(WAYS), default=list(WAYS), help="default all")
    parser.add_argument("--steps", type=int, default=4, help="of a turn (default 4)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default 5)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="one turn of one small step: proves that it runs")
    parser.add_argument("--accuracy", type=Path, metavar="RUN", help="also distil and test a student per row")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/distill-<device>.json")
    return parser


def main() -> None:
    a = arguments_parser().parse_args()
    if a.quick and a.record:
        sys.exit("error: a rehearsal is not recorded")
    device = resolve_device(a.device)
    turns, steps = (1, 1) if a.quick else (a.repeats, a.steps)
    result: dict[str, Any] = {"machine": describe(device), "turns": turns, "pairs": [], "student_accuracy": {}}
    for of in a.pairs or defaults(device, a.quick):
        result["pairs"].append(bench(of, device, steps, turns, a.ways))
        print(json.dumps(result), flush=True)  # for who stops it; the last line is the whole
    if a.accuracy:
        with tempfile.TemporaryDirectory() as folder:
            result["student_accuracy"] = accuracies(a.accuracy, a.ways, device, Path(folder))
    finish(result, markdown(result), "distill" if a.record else "")


if __name__ == "__main__":
    main()
