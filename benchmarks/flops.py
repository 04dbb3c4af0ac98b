"""How much arithmetic a function is, how fast a device does it at best, and timing in turns.

FLOP are those of convolutions, matrix products and attention by their definitions, a multiplication and an addition
being two. Norms and activations count nothing, and an algorithm that needs fewer (Winograd) is counted as if it needed
all: a share of the ceiling compares speeds, it is no utilisation of units.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")

SIDES = {"cpu": 2048, "cuda": 8192}  # of a square matmul: 17 GFLOP and 1.1 TFLOP, past what start-up costs
PAUSE = 0.02  # seconds between calls: thread pools of one backend spin for a while after its call, on the other's cores


@dataclass(frozen=True)
class DataSheet:
    """A GPU as its maker describes it.

    flops: dense FLOP/s by precision, of tensor cores where there are any. bandwidth: bytes/s.
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float


def _sheet(name: str, half: float, tf32: float, single: float, bandwidth: float) -> DataSheet:
    flops = {"float16": half * 1e12, "bfloat16": half * 1e12, "tf32": tf32 * 1e12, "float32": single * 1e12}
    return DataSheet(name, flops, bandwidth * 1e12)


# NVIDIA's data sheets: TFLOP/s without sparsity, accumulated in float32; TB/s.
SHEETS: Mapping[str, DataSheet] = {
    "H200": _sheet("H200 SXM", 989, 494, 67, 4.8),
    "H100": _sheet("H100 SXM", 989, 494, 67, 3.35),
    "A100": _sheet("A100 SXM 80GB", 312, 156, 19.5, 2.039),
    "RTX4090": _sheet("GeForce RTX 4090", 165.2, 82.6, 82.6, 1.008),
}


def peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense FLOP/s of the device's data sheet, what MFU is a share of; None where none is known here."""
    if device.type != "cuda":
        return None
    plain = torch.cuda.get_device_name(device).replace(" ", "")
    sheet = next((sheet for model, sheet in SHEETS.items() if model in plain), None)
    return sheet.flops.get(precision(device, dtype)) if sheet else None


def precision(device: torch.device, dtype: torch.dtype) -> str:
    """What networks of this dtype compute in here: torch lets convolutions of float32 use TF32 on a GPU by default."""
    if device.type == "cuda" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        return "tf32"
    return str(dtype).removeprefix("torch.")


def counted(call: Callable[..., T], *arguments: torch.Tensor) -> tuple[T, int]:
    """What call(*arguments) returns, and its FLOP: forward, and backward where it differentiates.

    Attention runs as two matrix products meanwhile, since the counter knows no fused one on a CPU; of other libraries'
    kernels (xformers) it sees nothing. Its hooks fail on an nn.Module that gets the differentiated leaf itself.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call(*arguments)
    return result, counter.get_total_flops()


def matmul(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A square matmul in the precision of these networks, and its FLOP: the ceiling."""
    side, name = SIDES[device.type], precision(device, dtype)
    a = torch.randn(side, side, device=device).to(torch.float32 if name == "tf32" else dtype)
    return partial(_matmul, a, name == "tf32"), 2 * side**3


def in_turns(
    calls: Mapping[str, Callable[[], object]], turns: int, device: torch.device, warm: bool = False
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every call, one a turn, after a turn that is not counted unless they are warm; who begins goes round.

    Returns seconds by name, and why by name of what failed, which has no seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    names = list(calls)
    for turn in range(1 if warm else 0, turns + 1):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            if name in failed:
                continue
            time.sleep(PAUSE)
            try:
                spent = timed(calls[name], device)
            except Exception as error:  # such as memory that is short: the others are measured still
                failed[name] = reason(error)
                continue
            if turn:
                seconds[name].append(spent)
    return {name: found for name, found in seconds.items() if name not in failed}, failed


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device is done with it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def reason(error: Exception) -> str:
    """An exception in one line."""
    first = (str(error).strip() or "no message").partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:300]


def _matmul(a: torch.Tensor, tf32: bool) -> torch.Tensor:
    with _tf32(tf32), torch.no_grad():
        return a @ a


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
