"""Group normalisation with SiLU beside eager PyTorch and torch.compile: bytes, bandwidth, share of a copy's.

    python -m benchmarks.bench_group_norm_silu                                on a GPU where there is one
    python -m benchmarks.bench_group_norm_silu --maps 512x64 --batches 4      channels x side of the feature maps

    forward   y of x
    training  y, then the gradient in x: what the guidance gradient has of it

Feature maps in NHWC, in 32 groups, of Stable Diffusion's VAE at 512x512 pixels and of its UNet, in float16 and
bfloat16. What must move is x and y, and for the gradient x, dy and dx: each once. A map whose group one program does
not keep is read twice, so that where no cache holds it two thirds of a copy's bandwidth are all that there is forward,
and five eighths of it with the gradient; "readings" says which it is. What is measured, and what is said without a GPU:
benchmarks/bandwidth.py. An engine does not go by this table: its build times both, and keeps the quicker.
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
from dfkd_kernels.group_norm_silu import group_norm_silu, tiling

GROUPS = 32
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
LAUNCHES = ("forward", "training")
MAPS = "512x64,512x128,256x256,128x512,320x64,1280x8"
MOST = 2**31 - 1  # elements of a tensor that PyTorch's own kernels take


def moved(launch: str, batch: int, channels: int, side: int, dtype: str) -> int:
    """Bytes that must move: the maps once each, the weights, and mean and deviation between the two passes."""
    each = DTYPES[dtype].itemsize
    maps, weights, statistics = batch * channels * side**2 * each, 2 * channels * each, 2 * batch * GROUPS * 4
    if launch == "forward":
        return 2 * maps + weights
    return 5 * maps + 2 * weights + 2 * statistics


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return group_norm_silu(x, weight, bias, GROUPS)


def trained(call: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """y and the gradient in x."""
    with torch.enable_grad():
        y = call(x, weight, bias)
        (gradient,) = torch.autograd.grad(y, x, dy)
    return y, gradient


def ways_of(
    launch: str, batch: int, channels: int, side: int, dtype: str, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """By way, a call on tensors that all share."""
    kind = DTYPES[dtype]
    x, dy = (torch.randn(batch, channels, side, side, device=device, dtype=kind) for _ in range(2))
    x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
    weight, bias = (torch.randn(channels, device=device, dtype=kind) for _ in range(2))
    ways = {"triton": fused, "eager": eager, "compile": bandwidth.compiled(eager)}
    if launch == "forward":
        return {way: partial(call, x, weight, bias) for way, call in ways.items()}
    return {way: partial(trained, call, x.requires_grad_(), weight, bias, dy) for way, call in ways.items()}


def launches(maps: list[tuple[int, int]], batches: list[int]) -> Iterator[Launch]:
    for (channels, side), batch, dtype, launch in product(maps, batches, DTYPES, LAUNCHES):
        if batch * channels * side**2 > MOST:
            continue
        given = (launch, batch, channels, side, dtype)
        readings = 1 if tiling(channels, GROUPS, side**2, True).whole else 2
        labels = {"channels": channels, "side": side, "batch": batch, "dtype": dtype, "launch": launch}
        yield Launch({**labels, "readings": readings}, moved(*given), partial(ways_of, *given))


def main() -> None:
    given = bandwidth.parser(__doc__, "group_norm_silu")
    maps = bandwidth.maps_of
    given.add_argument("--maps", type=maps, default=maps(MAPS), help=f"channels x side (default {MAPS})")
    given.add_argument("--batches", type=bandwidth.integers, default=[4, 31], help="images (default 4,31)")
    a = given.parse_args()
    bandwidth.report("group_norm_silu", launches(a.maps, a.batches), a)


if __name__ == "__main__":
    main()
