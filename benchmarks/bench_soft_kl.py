"""Distillation's loss and its gradient beside eager PyTorch and torch.compile: bytes, bandwidth, share of a copy's.

    python -m benchmarks.bench_soft_kl                          on a GPU where there is one
    python -m benchmarks.bench_soft_kl --batches 256 --classes 1000

    rows      losses [B] and gradient [B, C]: the launch itself, beside the reference's operations
    training  mean loss, then its backward pass, as a run has them

Logits in float32 and in bfloat16; 256 rows are a published batch, 65536 enough to leave the cache. What must move is
the same in both: two reads and a write of [B, C]. The backward pass of a run moves the gradient twice more, and past
soft_kl.WIDEST classes logits are read twice, the second time from the cache where it holds the rows in flight: shares
show it. What is measured, and what is said without a GPU: benchmarks/bandwidth.py.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks import bandwidth
from benchmarks.bandwidth import Launch
from dfkd.training.losses import kl_at_temperature
from dfkd_kernels.soft_kl import _operator, soft_kl, soft_kl_ref

TEMPERATURE = 4.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAUNCHES = ("rows", "training")


def moved(launch: str, batch: int, classes: int, dtype: str) -> int:
    """Bytes that must move: logits, gradient and, of rows, the losses."""
    return batch * (3 * classes * DTYPES[dtype].itemsize + 4 * (launch == "rows"))


def fused(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return soft_kl(student, teacher, temperature).mean()


def trained(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss and its gradient in the student's logits."""
    with torch.enable_grad():
        found = loss(student, teacher, TEMPERATURE)
        (gradient,) = torch.autograd.grad(found, student)
    return found, gradient


def ways_of(
    launch: str, batch: int, classes: int, dtype: str, device: torch.device
) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """By way, a call on tensors that all share."""
    student, teacher = (torch.randn(batch, classes, device=device).to(DTYPES[dtype]) for _ in range(2))
    if launch == "rows":
        rows: dict[str, Callable[..., Any]] = {
            "triton": _operator,
            "eager": soft_kl_ref,
            "compile": bandwidth.compiled(soft_kl_ref),
        }
        return {way: partial(call, student, teacher, TEMPERATURE, False) for way, call in rows.items()}
    losses: dict[str, Callable[..., Tensor]] = {"triton": fused, "eager": kl_at_temperature}
    losses["compile"] = bandwidth.compiled(kl_at_temperature)
    return {way: partial(trained, loss, student.requires_grad_(), teacher) for way, loss in losses.items()}


def launches(batches: list[int], classes: list[int]) -> Iterator[Launch]:
    for batch, count, dtype, launch in product(batches, classes, DTYPES, LAUNCHES):
        labels: dict[str, Any] = {"batch": batch, "classes": count, "dtype": dtype, "launch": launch}
        yield Launch(labels, moved(launch, batch, count, dtype), partial(ways_of, launch, batch, count, dtype))


def main() -> None:
    given = bandwidth.parser(__doc__, "soft_kl")
    given.add_argument("--batches", type=bandwidth.integers, default=[256, 65536], help="rows (default 256,65536)")
    given.add_argument(
        "--classes", type=bandwidth.integers, default=[10, 100, 1000, 21841], help="default 10,100,1000,21841"
    )
    a = given.parse_args()
    bandwidth.report("soft_kl", launches(a.batches, a.classes), a)


if __name__ == "__main__":
    main()
