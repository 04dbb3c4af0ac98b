"""The launches of a guided step beside eager PyTorch and torch.compile: bytes, bandwidth, share of a copy's.

    python -m benchmarks.bench_guided_step                      on a GPU where there is one
    python -m benchmarks.bench_guided_step --batches 64,512

Latents [B, 4, 64, 64] float32, networks in float16, all channels_last. (With a norm each program reads its image's
gradient again, which the cache holds.) What is measured, and what is said without a GPU: benchmarks/bandwidth.py.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.bandwidth import Launch, floor, integers, parser, report
from dfkd_kernels.guided_step import GUIDED_STEPS, GuidedStep
from dfkd_kernels.rows import NetworkInput

SHAPE = (4, 64, 64)
LATENT, NETWORK = 4, 2  # bytes a value

# Values an element of the latents, read and written once: (of the latents' dtype, of the networks').
LAUNCHES = {
    "clean": (1, 2 + 1),  # z; u, c, x
    "update": (2, 2 + 1 + 2),  # z, z'; u, c, g, two rows
    "update with noise": (2, 2 + 1 + 2),  # the noise is made where it is used
    "push": (3, 1 + 1),  # push, z0hat, push'; g, x
}


def moved(launch: str, batch: int) -> int:
    """Bytes that must move; an image's length, its id and the coefficients are not counted."""
    latent, network = LAUNCHES[launch]
    return batch * SHAPE[0] * SHAPE[1] * SHAPE[2] * (latent * LATENT + network * NETWORK)


def calls_of(
    step: GuidedStep, batch: int, device: torch.device, dtype: torch.dtype = torch.float16
) -> dict[str, Callable[[], object]]:
    """By launch, a call on tensors of its own. dtype: of the networks."""
    order = torch.channels_last

    def normal(rows: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(rows, *SHAPE, device=device).to(dtype).to(memory_format=order)

    z, push, clean = (normal(batch, torch.float32) for _ in range(3))
    model, gradient = normal(2 * batch, dtype), normal(batch, dtype)
    row, length = torch.rand(8, device=device), torch.ones(batch, device=device)
    unet, decoder = NetworkInput(dtype, order), NetworkInput(dtype, order, 0.18215)
    update = partial(
        step.update, z, model, row, batch, 2, gradient=gradient, length=length, network=unet, next_copies=2
    )
    return {
        "clean": partial(step.clean, z, model, row, batch, 2, decoder, False),
        "update": update,
        "update with noise": partial(update, noise=(7, torch.arange(batch, device=device), 3)),
        "push": partial(step.push, push, gradient, length, "rms", 1.0, clean, decoder, batch, 1),
    }


def compiled(step: GuidedStep) -> GuidedStep:
    return GuidedStep(*(torch.compile(f, dynamic=False) for f in (step.clean, step.push, step.update)))


def launches(batches: list[int], device: torch.device) -> Iterator[Launch]:
    ways = {
        "triton": GUIDED_STEPS["triton"],
        "eager": GUIDED_STEPS["torch"],
        "compile": compiled(GUIDED_STEPS["torch"]),
    }
    for batch in batches:
        made = {way: calls_of(step, batch, device) for way, step in ways.items()}
        for launch in LAUNCHES:
            calls = {way: made[way][launch] for way in ways}
            yield Launch({"batch": batch, "launch": launch}, moved(launch, batch), calls)


def floors(batches: list[int]) -> list[dict[str, Any]]:
    return [floor({"batch": batch, "launch": launch}, moved(launch, batch)) for batch in batches for launch in LAUNCHES]


def main() -> None:
    given = parser(__doc__, "guided_step")
    given.add_argument("--batches", type=integers, default=[8, 64, 512], help="images (default 8,64,512)")
    a = given.parse_args()
    report("guided_step", floors(a.batches), partial(launches, a.batches), a)


if __name__ == "__main__":
    main()
