"""How long a synthesis will take: seconds of every network call, times how many there are.

Calls on an engine take what was measured when it was built; others are tried: on a GPU with the rows of the plan,
which fewer would not fill, on a CPU with as many as a number of FLOP allows. Beside the calls the encoding of the
images counts, and nothing else.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dfkd.compiled.choose import Choice
from dfkd.compiled.requests import CALL_UNIT
from dfkd.synthesis.planning.calls import GRADIENTS, Call, network_calls
from dfkd.synthesis.planning.plan import Plan
from dfkd.data.shards.codec import encode
from dfkd.synthesis.memory import ShortMemory, calling, release
from dfkd.synthesis.run import Synthesis
from dfkd_engine.store import EngineStore

TRIAL = 1e10  # FLOP of a trial on a CPU, a tenth of a second or so: beside a run that is about to start
_LONG = 5.0  # seconds of a call past which it is not called again


@dataclass(frozen=True)
class Timing:
    """One network's share: `seconds` of a call, so many `calls` a group, and where the seconds come from.

    A call of the UNet without classifier-free guidance, in a run that has calls with it, counts as half a one.
    """

    seconds: float
    calls: float
    source: str


def predict(
    synthesis: Synthesis,
    plan: Plan,
    choices: Sequence[Choice],
    store: EngineStore,
    image_format: str = "png",
    trial: float = TRIAL,
) -> dict[str, Timing]:
    """By network: unet, decode, and the gradients that the synthesis takes; `write` is what an image's file takes.

    trial: FLOP of one on a CPU; the more, the closer, since a row costs less in a larger call. It is no time, since on
        a busy machine small calls are the slowest by far.
    """
    engines = {choice.network: choice.key for choice in choices if choice.key}
    parts = plan.calls["gradient"].calls if "gradient" in plan.calls else 1
    calls = network_calls(synthesis, parts)
    found = {}
    for name, number in counts(synthesis, plan).items():
        rows, share = calls_of(name, plan)
        manifest = store.get(engines[name]) if name in engines else None
        if manifest is not None:
            times = manifest.facts["milliseconds"]
            network_rows = rows * (plan.copies if name == "unet" else 1)
            seconds = float(times["engine"]) / 1000 * network_rows / int(times["rows"])
            found[name] = Timing(seconds, number, "engine, when it was built")
        else:
            flop = plan.footprints["gradient" if name in GRADIENTS else name].flop
            few = rows if synthesis.device.type == "cuda" else trial_rows(rows, flop, trial)
            seconds, tried = _tried(calls[name], rows, few, share, synthesis.device)
            found[name] = Timing(seconds, number, f"tried with {tried}")
    return found | {"write": Timing(write_seconds(synthesis, image_format), float(plan.group), "tried with 1")}


def calls_of(name: str, plan: Plan) -> tuple[int, int]:
    """Images a call of a network, and how many calls one of network_calls makes."""
    if name not in GRADIENTS:
        return plan.calls[name].rows, 1
    gradient = plan.calls["gradient"]
    return gradient.rows, 1 if gradient.calls == 1 else 2


def write_seconds(synthesis: Synthesis, image_format: str) -> float:
    """Of one image's encoding, which the CPU does; its size counts, and how much there is in it, here as in a photo."""
    side = synthesis.prior.vae_scale_factor
    height, width = side * synthesis.latent_size[0], side * synthesis.latent_size[1]
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    smooth = np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:height, :width]
    image = smooth ^ random.integers(0, 8, smooth.shape, dtype=np.uint8)
    encode(image, image_format)  # the first sets up
    started = time.perf_counter()
    encode(image, image_format)
    return time.perf_counter() - started


def counts(synthesis: Synthesis, plan: Plan) -> dict[str, float]:
    """Calls of a group, by network, as of Timing."""
    settings, steps = synthesis.settings, len(synthesis.table)
    full = sum((1 + settings.classifier_free(i, steps)) / plan.copies for i in range(steps))
    unet = {"unet": full * plan.calls["unet"].calls, "decode": float(plan.calls["decode"].calls)}
    if synthesis.guidance is None:
        return unet
    parts = plan.calls["gradient"].calls
    guided = sum(settings.guided(i, steps) for i in range(steps))
    taken = {
        "gradient": guided * settings.guidance_repeats,
        "pixel_gradient": settings.refine_steps,
        "noise_edit": settings.noise_edit_steps,
    }
    return unet | {name: float(times * parts) for name, times in taken.items() if times}


def total(timings: Mapping[str, Timing], groups: int) -> float:
    """Seconds of so many groups."""
    return groups * sum(timing.seconds * timing.calls for timing in timings.values())


def trial_rows(rows: int, flop: int, budget: float) -> int:
    """Of `rows` planned images, as many as `budget` FLOP allow where one takes `flop`; one at least."""
    most = int(budget // max(flop, 1))
    if most >= rows:
        return rows
    return max(most - most % CALL_UNIT if most > CALL_UNIT else most, 1)


def _tried(call: Call, rows: int, trial: int, share: int, device: torch.device) -> tuple[float, int]:
    """Seconds of a call of `rows` images, tried with `trial` of them, or as many as memory allows, which is the second;
    a trial makes `share` calls.
    """
    try:
        spent = _timed(call, trial, device)
        if spent < _LONG or device.type == "cuda":  # a first call sets up, and anything else that runs may delay one
            spent = min(spent, _timed(call, trial, device))
        return spent * rows / trial / share, trial
    except ShortMemory:
        pass  # here the failed call's tensors are gone
    release(device)
    # sampling will find its rows: a prediction ends no run
    return _tried(call, rows, trial // 2, share, device) if trial > 1 else (0.0, 0)


def _timed(call: Call, rows: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    with calling("trial"):
        call(rows)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
