"""The project's own operations beside what one would write: in PyTorch, as they run on a CPU, and in Triton on a GPU.

A second's bytes are those that must move, as the benchmarks of the single operations count them. On a CPU the group
norms and the moments of BatchNorm are PyTorch's own operations, so that these have rows on a GPU alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import bench_bn_moments, bench_group_norm_silu, bench_guided_step, bench_soft_kl
from benchmarks.bandwidth import Launch
from benchmarks.suite import plain
from benchmarks.suite.case import Absent, Group, Place, Work
from dfkd.training.losses import kl_at_temperature
from dfkd_kernels.guided_step import GUIDED_STEPS
from dfkd_kernels.philox import philox_normal

BASELINE = "plain PyTorch"
CLASSES = 100
LATENT = (8, 8, 8)
MAPS = [(64, 32)]  # channels, height and width of the feature maps of the two norms

Function = Callable[..., Any]


def batch(place: Place) -> int:
    return {"cpu": 16, "cuda": 64}[place.device.type] * (1 if place.quick else 4)


def guided(launch: str, step: Function, place: Place) -> Work:
    size, dtype = batch(place), torch.float16 if place.device.type == "cuda" else torch.float32
    call = bench_guided_step.calls_of({"": step}, launch, size, place.device, dtype)[""]
    return Work(call, bench_guided_step.moved(launch, size))


def soft_kl(loss: Function, place: Place) -> Work:
    rows = 16 * batch(place)
    student, teacher = (torch.randn(rows, CLASSES, device=place.device) for _ in range(2))
    call = partial(bench_soft_kl.trained, loss, student.requires_grad_(), teacher)
    return Work(call, bench_soft_kl.moved("training", rows, CLASSES, "float32"))


def launched(launch: Launch, way: str, place: Place) -> Work:
    return Work(launch.ways(place.device)[way], launch.moved)


def noise(function: Function, place: Place) -> Work:
    images = 16 * batch(place)
    ids = torch.arange(images, device=place.device)
    return Work(partial(function, ids), 4 * images * LATENT[0] * LATENT[1] * LATENT[2])


def randn(ids: Tensor) -> Tensor:
    return torch.randn(len(ids), *LATENT, device=ids.device)


def philox(ids: Tensor) -> Tensor:
    return philox_normal(0, ids, 0, LATENT)


def on_gpu(make: Callable[[Place], Work], place: Place) -> Work:
    if place.device.type != "cuda":
        raise Absent("Triton compiles for GPUs, and torch finds no CUDA device")
    return make(place)


def groups(device: torch.device, quick: bool) -> list[Group]:
    steps = {BASELINE: plain.guided_step, **GUIDED_STEPS}
    losses = {BASELINE: plain.soft_kl, "torch": kl_at_temperature, "triton": bench_soft_kl.fused}
    makes = {
        **{f"guided step, {launch}": (partial(guided, launch), steps) for launch in ("guided", "with noise")},
        "soft_kl": (soft_kl, losses),
        "noise": (noise, {BASELINE: randn, "philox": philox}),
    }
    found = []
    for name, (make, functions) in makes.items():
        rows = {way: partial(make, function) for way, function in functions.items()}
        rows |= {way: partial(on_gpu, row) for way, row in rows.items() if way == "triton"}
        found.append(Group(name, BASELINE, rows, "bytes"))
    launches = [*bench_group_norm_silu.launches(MAPS, [64]), *bench_bn_moments.launches([64], MAPS)]
    for launch in launches if device.type == "cuda" else ():
        kind = "bn_moments" if "readings" not in launch.labels else "group_norm_silu"
        name = f"{kind}, {launch.labels['launch']}, {launch.labels['dtype']}"
        found.append(
            Group(name, "eager", {way: partial(launched, launch, way) for way in ("eager", "triton")}, "bytes")
        )
    return found


def test_kernel(paired: Callable[[], None]) -> None:
    paired()
