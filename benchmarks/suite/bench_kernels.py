"""The project's own operations beside plain PyTorch: as they run on a CPU ("torch"), and in Triton on a GPU.

Forward and backward pass of what a gradient goes through. A second's bytes are those that must move, as the benchmarks
of the single operations count them. Networks compute in float32 on a CPU, in float16 on a GPU. The quick suite leaves
torch.compile out, which takes a while a row.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import bench_batch_norm_tap, bench_group_norm_silu, bench_guided_step, bench_soft_kl
from benchmarks.suite import plain
from benchmarks.suite.case import Absent, Group, Place, Work
from dfkd.training.losses import distillation_loss
from dfkd_engine.backends import get
from dfkd_kernels.batch_norm_tap import batch_norm_tap, batch_norm_tap_ref
from dfkd_kernels.group_norm_silu import group_norm_silu_ref
from dfkd_kernels.guided_step import GUIDED_STEPS, GuidedStep
from dfkd_kernels.philox import philox_normal

BASELINE, COMPILE = "plain PyTorch", "torch.compile"
MAP = (64, 32)  # channels, height and width of the feature maps of the two norms
CLASSES = 100
LATENT = (8, 8, 8)

Function = Callable[..., Any]
Build = Callable[[Function, Place], Work]  # the function on tensors of its own


def batch(place: Place) -> int:
    return {"cpu": 16, "cuda": 64}[place.device.type] * (1 if place.quick else 4)


def dtype(place: Place) -> torch.dtype:
    return torch.float16 if place.device.type == "cuda" else torch.float32


def guided(launch: str) -> Build:
    def build(function: Function, place: Place) -> Work:
        step = GuidedStep(function, function, function)  # of which `launch` is one
        call = bench_guided_step.calls_of(step, batch(place), place.device, dtype(place))[launch]
        return Work(call, bench_guided_step.moved(launch, batch(place)))

    return build


def soft_kl(loss: Function, place: Place) -> Work:
    rows = 16 * batch(place)
    student, teacher = (torch.randn(rows, CLASSES, device=place.device) for _ in range(2))
    labels = torch.randint(CLASSES, (rows,), device=place.device)
    student.requires_grad_()

    def trained() -> tuple[Tensor, ...]:
        found = loss(student, teacher, bench_soft_kl.TEMPERATURE, labels, bench_soft_kl.CE_WEIGHT)
        return torch.autograd.grad(found, student)

    return Work(trained, bench_soft_kl.moved("training", rows, CLASSES, "float32"))


def group_norm_silu(function: Function, place: Place) -> Work:
    (channels, side), kind = MAP, dtype(place)
    x, dy = (torch.randn(batch(place), channels, side, side, device=place.device, dtype=kind) for _ in range(2))
    x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
    weight, bias = (torch.randn(channels, device=place.device, dtype=kind) for _ in range(2))
    call = partial(bench_group_norm_silu.trained, function, x.requires_grad_(), weight, bias, dy)
    return Work(call, 5 * x.numel() * x.element_size())


def batch_norm_tap_with_moments(function: Function, place: Place) -> Work:
    channels, side = MAP
    shape = (batch(place), channels, side, side)
    x, dy = (torch.randn(shape, device=place.device).to(memory_format=torch.channels_last) for _ in range(2))
    of_moments = tuple(torch.randn(shape[:2], device=place.device) for _ in range(2))
    layer = (torch.rand(channels, device=place.device) + 0.2 for _ in range(4))
    given = (x.requires_grad_(), *layer, bench_batch_norm_tap.EPS, True)
    call = partial(bench_batch_norm_tap.differentiated, function, *given, of=(dy, *of_moments))
    return Work(call, bench_batch_norm_tap.moved("gradient", batch(place), MAP, "float32"))


def noise(function: Function, place: Place) -> Work:
    images = 16 * batch(place)
    ids = torch.arange(images, device=place.device)
    return Work(partial(function, ids), 4 * images * LATENT[0] * LATENT[1] * LATENT[2])


def randn(ids: Tensor) -> Tensor:
    return torch.randn(len(ids), *LATENT, device=ids.device)


def philox(ids: Tensor) -> Tensor:
    return philox_normal(0, ids, 0, LATENT)


def row(name: str, build: Build, function: Function, place: Place) -> Work:
    if name == "triton" and place.device.type != "cuda":
        raise Absent("Triton compiles for GPUs, and torch finds no CUDA device")
    if name == COMPILE and (why := get("inductor").unusable(place.device, "float32")):
        raise Absent(why)
    return build(torch.compile(function, dynamic=False) if name == COMPILE else function, place)


def group(name: str, build: Build, functions: Mapping[str, Function], quick: bool) -> Group:
    every = dict(functions) if quick else {**functions, COMPILE: functions[BASELINE]}
    return Group(name, BASELINE, {of: partial(row, of, build, function) for of, function in every.items()}, "bytes")


def groups(device: torch.device, quick: bool) -> list[Group]:
    ours, triton = GUIDED_STEPS["torch"], GUIDED_STEPS["triton"]
    launches = {
        "clean": (plain.clean, ours.clean, triton.clean),
        "push": (plain.push, ours.push, triton.push),
        "update": (plain.update, ours.update, triton.update),
        "update with noise": (plain.update, ours.update, triton.update),
    }
    losses = (plain.distillation_loss, *(partial(distillation_loss, kernels=name) for name in ("torch", "triton")))
    norm = partial(group_norm_silu_ref, groups=bench_group_norm_silu.GROUPS)
    operations: dict[str, tuple[Build, tuple[Function, ...]]] = {
        **{f"guided step, {launch}": (guided(launch), functions) for launch, functions in launches.items()},
        "soft_kl": (soft_kl, losses),
        "group_norm_silu": (group_norm_silu, (bench_group_norm_silu.eager, norm, bench_group_norm_silu.fused)),
        "batch_norm_tap": (
            batch_norm_tap_with_moments,
            (bench_batch_norm_tap.hooked, batch_norm_tap_ref, batch_norm_tap),
        ),
    }
    rows = (BASELINE, "torch", "triton")
    found = [
        group(name, build, dict(zip(rows, functions, strict=True)), quick)
        for name, (build, functions) in operations.items()
    ]
    return [*found, group("noise", noise, {BASELINE: randn, "philox": philox}, True)]


def test_kernel(paired: Callable[[], None]) -> None:
    paired()
