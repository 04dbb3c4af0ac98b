"""BatchNorm with its moments beside eager PyTorch with hooks and torch.compile: bytes, bandwidth, share of a copy's.

    python -m benchmarks.bench_bn_moments                   on a GPU where there is one
    python -m benchmarks.bench_bn_moments --batches 16 --maps 64x112,2048x7

    forward   y = relu(batch norm(x)) and the moments of x [B, C]: what a group in several calls takes first
    gradient  the same, and dx for gradients of y and of the moments, as L_bn gives them

Maps of channels x side of a CIFAR network and of a ResNet-50 at 224 pixels, in channels_last, as teachers run, and in
float32, as dfkd-generate keeps BatchNorm teachers, and bfloat16. What must move: x and y, and for the gradient x, dy
and dx; moments and their gradients are counted too. What is measured, and what is said without a GPU:
benchmarks/bandwidth.py. Where torch.compile is the quicker one here, an engine of inductor may be so for a whole
guidance gradient: dfkd-engines times both on the machine, and --backend auto takes the quicker.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bandwidth
from benchmarks.bandwidth import Launch
from dfkd.synthesis.bn_statistics import moments_about
from dfkd_kernels.bn_moments import bn_moments

EPS = 1e-5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAUNCHES = ("forward", "gradient")
MAPS = "16x32,64x32,128x16,256x8,64x112,256x56,512x28,1024x14,2048x7"
Map = tuple[int, int]  # channels, height and width


def hooked(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What a pass with hooks does: the moments, the layer, and the ReLU behind it."""
    m1, m2 = moments_about(x.float(), mean)
    y = F.batch_norm(x, mean, variance, weight, bias, eps=eps)
    return (F.relu(y) if relu else y), m1, m2


def moved(launch: str, batch: int, of: Map, dtype: str) -> int:
    """Bytes that must move: maps, moments [B, C] in float32, and the layer's four numbers a channel, once a launch."""
    channels, side = of
    maps, moments, passes = (2, 2, 1) if launch == "forward" else (5, 4, 2)
    size = channels * side * side * DTYPES[dtype].itemsize
    return batch * (maps * size + moments * channels * 4) + passes * 4 * channels * 4


def differentiated(function: Callable[..., Any], x: Tensor, *given: Any, of: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """y, m1, m2 and the gradient in x."""
    with torch.enable_grad():
        found = function(x, *given)
        (gradient,) = torch.autograd.grad(found, x, of)
    return *found, gradient


def ways_of(
    launch: str, batch: int, of: Map, dtype: str, device: torch.device
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """By way, a call on tensors that all share."""
    channels, side = of
    shape = (batch, channels, side, side)
    x, dy = (torch.randn(shape, device=device).to(DTYPES[dtype], memory_format=torch.channels_last) for _ in range(2))
    moments = tuple(torch.randn(batch, channels, device=device) for _ in range(2))
    mean, variance, weight, bias = (torch.rand(channels, device=device) + 0.2 for _ in range(4))
    given = (mean, variance, weight, bias, EPS, True)
    functions: dict[str, Callable[..., Any]] = {"triton": bn_moments, "eager": hooked}
    functions["compile"] = bandwidth.compiled(hooked)
    if launch == "forward":
        return {way: partial(function, x, *given) for way, function in functions.items()}
    x.requires_grad_()
    return {way: partial(differentiated, f, x, *given, of=(dy, *moments)) for way, f in functions.items()}


def launches(batches: list[int], maps: list[Map]) -> Iterator[Launch]:
    for batch, of, dtype, launch in product(batches, maps, DTYPES, LAUNCHES):
        labels = {"batch": batch, "channels": of[0], "side": of[1], "dtype": dtype, "launch": launch}
        yield Launch(labels, moved(launch, batch, of, dtype), partial(ways_of, launch, batch, of, dtype))


def main() -> None:
    given = bandwidth.parser(__doc__, "bn_moments")
    maps = bandwidth.maps_of
    given.add_argument("--batches", type=bandwidth.integers, default=[16, 64], help="images (default 16,64)")
    given.add_argument("--maps", type=maps, default=maps(MAPS), help=f"channels x side (default {MAPS})")
    a = given.parse_args()
    bandwidth.report("bn_moments", launches(a.batches, a.maps), a)


if __name__ == "__main__":
    main()
