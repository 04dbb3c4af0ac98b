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

Rows but the first are channels_last. Images lie on the device ready: a loader's work is not in these steps. --accuracy
distils the run's images with each row's options and tests the student on the demo's test images.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import driver
from benchmarks.driver import Group, Work
from benchmarks.recording import names_of
from dfkd import teachers
from dfkd.config import DistillConfig
from dfkd.errors import UsageError
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
        return f"{self.teacher} to {self.student}, {self.size}x{self.size}"


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


def work(way: str, of: Pair, device: torch.device, accuracy: float | None = None) -> Work:
    step, started = made(way, of, device), time.perf_counter()
    for _ in range(5):  # compiles, and captures after three
        step()
    facts: dict[str, Any] = {"compile s": time.perf_counter() - started} if "compile" in WAYS[way] else {}
    facts |= {} if accuracy is None else {"student": f"{100 * accuracy:.1f} %"}
    return Work(step, of.batch, flop(of), facts)


def groups(
    pairs: Sequence[Pair], device: torch.device, ways: Sequence[str] = tuple(WAYS), students: Mapping[str, float] = {}
) -> list[Group]:
    """A group for every pair. students: accuracies by way, of the first pair's."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = []
    for of in pairs:
        told = students if of is pairs[0] else {}
        rows = {way: partial(work, way, of, device, told.get(way)) for way in ways}
        found.append(Group(f"distillation, {of}", "eager", rows, dtype=dtype))
    return found


def accuracies(run: Path, ways: Sequence[str], device: torch.device, folder: Path) -> dict[str, float]:
    """Test accuracy of a student of a dfkd-run of the demo by way; none for eager, which dfkd-distill is not.

    By SGD, for not every way goes with the preset's Muon.
    """
    from dfkd.evaluation import evaluate
    from dfkd.training.distill import distill

    teacher, found = teachers.Classifier.from_pretrained(run / "teacher"), {}
    for way in (way for way in ways if way != "eager"):
        try:
            config = DistillConfig.preset("demo", optimiser="sgd", lr=0.2, device=str(device), **changes(way, device))
            student = distill(run / "synthetic", teacher, config, folder / way)
        except UsageError:  # for the reason that its row has
            continue
        found[way] = evaluate(student, "digits-on-photos").accuracy
    return found


def defaults(device: torch.device) -> list[Pair]:
    if device.type == "cpu":
        return [Pair("resnet8_half", "resnet8_half", 32, 128), Pair("resnet20", "resnet8", 32, 128)]
    return [Pair("resnet34", "resnet18", 32, 256), Pair("resnet34_imagenet", "resnet18_imagenet", 224, 256)]


def main() -> None:
    parser = driver.parser(__doc__)
    parser.add_argument("--pairs", type=Pair.of, nargs="+", help="TEACHER:STUDENT:SIZE:BATCH of the zoo")
    parser.add_argument("--ways", type=names_of(WAYS), default=list(WAYS), help="default all")
    parser.add_argument("--accuracy", type=Path, metavar="RUN", help="also distil and test a student per row")
    a = parser.parse_args()
    pairs, students = a.pairs or defaults(a.device), {}
    if a.accuracy:
        with tempfile.TemporaryDirectory() as folder:
            students = accuracies(a.accuracy, a.ways, a.device, Path(folder))
    batches = ", ".join(str(of.batch) for of in pairs)
    note = f"A step of {batches} images" + ("; student: the demo's, in this way. " if students else ". ")
    driver.run(groups(pairs, a.device, a.ways, students), a, "bench_distill", note=note)


if __name__ == "__main__":
    main()
