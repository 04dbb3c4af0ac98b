"""How long a synthesis will take: seconds of every network call, times how many there are.

Calls on an engine take what was measured when it was built; others are tried, twice with the same rows, and quickly: on
a CPU with a few rows, on a GPU, which a few do not fill, with those of the plan. What is between the calls is not
counted.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dfkd.engines.choose import Choice
from dfkd.engines.requests import CALL_UNIT
from dfkd.planning.calls import GRADIENTS, Call, network_calls
from dfkd.planning.plan import Plan
from dfkd.synthesis.memory import ShortMemory, calling, release
from dfkd.synthesis.run import Synthesis
from engine.store import EngineStore

_PATIENCE = 0.5  # seconds that a trial on a CPU may take


@dataclass(frozen=True)
class Timing:
    """One network's share: `seconds` of a call, so many `calls` a group, and where the seconds come from.

    A call of the UNet without classifier-free guidance, in a run that has calls with it, counts as half a one.
    """

    seconds: float
    calls: float
    source: str


def predict(synthesis: Synthesis, plan: Plan, choices: Sequence[Choice], store: EngineStore) -> dict[str, Timing]:
    """By network: unet, decode, and the gradients that the synthesis takes."""
    rows = {name: plan.calls["gradient" if name in GRADIENTS else name].rows for name in counts(synthesis, plan)}
    engines = {choice.network: choice.key for choice in choices if choice.key}
    parts = plan.calls["gradient"].calls if "gradient" in plan.calls else 1
    calls = network_calls(synthesis, parts)
    found = {}
    for name, number in counts(synthesis, plan).items():
        manifest = store.get(engines[name]) if name in engines else None
        if manifest is not None:
            times = manifest.facts["milliseconds"]
            network_rows = rows[name] * (plan.copies if name == "unet" else 1)
            seconds = float(times["engine"]) / 1000 * network_rows / int(times["rows"])
            found[name] = Timing(seconds, number, "engine, when it was built")
        else:
            share = 2 if parts > 1 and name in GRADIENTS else 1
            seconds, tried = _tried(calls[name], rows[name], share, synthesis)
            found[name] = Timing(seconds, number, f"tried with {tried}")
    return found


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


def _tried(call: Call, rows: int, share: int, synthesis: Synthesis) -> tuple[float, int]:
    """Seconds of a call of `rows` images, and with how many it was tried; a trial makes `share` calls of them."""
    tried = rows if synthesis.device.type == "cuda" else 1
    try:
        spent = _timed(call, tried, synthesis.device)  # a first call of any size is slower: libraries set up
        if tried < rows and spent * min(rows, CALL_UNIT) < _PATIENCE:
            tried = min(rows, CALL_UNIT)
            spent = _timed(call, tried, synthesis.device)
        if spent < _PATIENCE or synthesis.device.type == "cuda":
            spent = _timed(call, tried, synthesis.device)
    except ShortMemory:
        tried = 0  # here the failed call's tensors are gone
    if not tried:  # sampling will find its rows: a prediction ends no run
        release(synthesis.device)
        if rows == 1:
            return 0.0, 0
        half, tried = _tried(call, rows // 2, share, synthesis)
        return half * rows / (rows // 2), tried
    return spent * rows / tried / share, tried


def _timed(call: Call, rows: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    with calling("trial"):
        call(rows)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
