"""Distillation's loss and its gradient beside eager PyTorch and torch.compile: bytes, bandwidth, share of a copy's.

    python -m benchmarks.bench_soft_kl                          on a GPU where there is one
    python -m benchmarks.bench_soft_kl --batches 256 --classes 1000

    rows      losses [B] and gradient [B, C]: the launch itself, beside the reference's operations
    training  mean loss with cross-entropy, then its backward pass, as a run has them

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

from benchmarks.bandwidth import Launch, floor, integers, parser, report
from dfkd.training.losses import distillation_loss
from dfkd_kernels.soft_kl import _operator, soft_kl_ref

TEMPERATURE, CE_WEIGHT = 4.0, 0.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAUNCHES = ("rows", "training")


def moved(launch: str, batch: int, classes: int, dtype: str) -> int:
    """Bytes that must move: logits, gradient, and of a row its label and, where it is given, its loss."""
    of_row = 8 + 4 * (launch == "rows")
    return batch * (3 * classes * DTYPES[dtype].itemsize + of_row)


def trained(
    student: Tensor, teacher: Tensor, labels: Tensor, loss: Callable[..., Tensor], kernels: str
) -> tuple[Tensor, Tensor]:
    """Mean loss and its gradient in the student's logits."""
    with torch.enable_grad():
        found = loss(student, teacher, TEMPERATURE, labels, CE_WEIGHT, kernels)
        (gradient,) = torch.autograd.grad(found, student)
    return found, gradient


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def ways_of(
    launch: str, batch: int, classes: int, dtype: str, device: torch.device
) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """By way, a call on tensors of its own."""
    student, teacher = (torch.randn(batch, classes, device=device).to(DTYPES[dtype]) for _ in range(2))
    labels = torch.randint(classes, (batch,), device=device)
    if launch == "rows":
        of_rows = {"triton": _operator, "eager": soft_kl_ref, "compile": compiled(soft_kl_ref)}
        given = (student, teacher, TEMPERATURE, labels, CE_WEIGHT, False)
        return {way: partial(call, *given) for way, call in of_rows.items()}
    of_run = {"triton": distillation_loss, "eager": distillation_loss, "compile": compiled(distillation_loss)}
    given = (student.requires_grad_(), teacher, labels)
    return {
        way: partial(trained, *given, call, "triton" if way == "triton" else "torch") for way, call in of_run.items()
    }


def labels_of(batches: list[int], classes: list[int]) -> Iterator[tuple[int, int, str, str]]:
    return product(batches, classes, DTYPES, LAUNCHES)


def launches(batches: list[int], classes: list[int], device: torch.device) -> Iterator[Launch]:
    for batch, count, dtype, launch in labels_of(batches, classes):
        labels = {"batch": batch, "classes": count, "dtype": dtype, "launch": launch}
        yield Launch(labels, moved(launch, batch, count, dtype), ways_of(launch, batch, count, dtype, device))


def floors(batches: list[int], classes: list[int]) -> list[dict[str, Any]]:
    return [
        floor({"batch": batch, "classes": count, "dtype": dtype, "launch": launch}, moved(launch, batch, count, dtype))
        for batch, count, dtype, launch in labels_of(batches, classes)
    ]


def main() -> None:
    given = parser(__doc__, "soft_kl")
    given.add_argument("--batches", type=integers, default=[256, 65536], help="rows (default 256,65536)")
    given.add_argument("--classes", type=integers, default=[10, 100, 1000, 21841], help="default 10,100,1000,21841")
    a = given.parse_args()
    report("soft_kl", floors(a.batches, a.classes), partial(launches, a.batches, a.classes), a)


if __name__ == "__main__":
    main()
