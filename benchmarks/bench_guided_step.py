"""A guided sampling step in one launch beside eager PyTorch and torch.compile: bytes, bandwidth, share of a copy's.

    python -m benchmarks.bench_guided_step                      on a GPU where there is one
    python -m benchmarks.bench_guided_step --batches 64,512

Latents [B, 4, 64, 64] in float32, outputs of the network with and without the prompt in float16. What is measured, and
what is said without a GPU: benchmarks/bandwidth.py.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import bandwidth
from benchmarks.bandwidth import Launch
from dfkd_kernels.guided_step import GUIDED_STEPS

SHAPE = (4, 64, 64)
TERMS = {"guided": ("push",), "with noise": ("push", "noise"), "every term": ("push", "before", "noise", "mix")}


def moved(launch: str, batch: int) -> int:
    """Bytes that must move: z, push, z', z0 and perhaps before; u and c. Ids, boxes and coefficients count nothing."""
    latents = 4 + ("before" in TERMS[launch])
    return batch * SHAPE[0] * SHAPE[1] * SHAPE[2] * (latents * 4 + 2 * 2)


def calls_of(
    steps: Mapping[str, Callable[..., Any]],
    launch: str,
    batch: int,
    device: torch.device,
    dtype: torch.dtype = torch.float16,
) -> dict[str, Callable[[], Any]]:
    """Every step called on tensors that all share. dtype: of the network."""
    z, push, before = (torch.randn(batch, *SHAPE, device=device) for _ in range(3))
    model, row = torch.randn(2, batch, *SHAPE, device=device).to(dtype), torch.rand(8, device=device)
    ids = torch.arange(batch, device=device)
    box = torch.tensor([8, 8, 40, 40], device=device).repeat(batch, 1)
    terms = {"push": push, "before": before, "noise": (7, ids, 3), "mix": (ids.roll(1), box)}
    given = {term: terms[term] for term in TERMS[launch]}
    return {way: partial(step, z, model, row, **given) for way, step in steps.items()}


def ways_of(launch: str, batch: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    eager = GUIDED_STEPS["torch"]
    steps = {"triton": GUIDED_STEPS["triton"], "eager": eager, "compile": bandwidth.compiled(eager)}
    return calls_of(steps, launch, batch, device)


def launches(batches: list[int]) -> Iterator[Launch]:
    for batch in batches:
        for launch in TERMS:
            labels = {"batch": batch, "launch": launch}
            yield Launch(labels, moved(launch, batch), partial(ways_of, launch, batch))


def main() -> None:
    given = bandwidth.parser(__doc__, "guided_step")
    given.add_argument("--batches", type=bandwidth.integers, default=[8, 64, 512], help="images (default 8,64,512)")
    a = given.parse_args()
    bandwidth.report("guided_step", launches(a.batches), a)


if __name__ == "__main__":
    main()
