"""The length of a guidance step, found on a few images before the first one of a run, without any data.

    J(rho) = mean over V random views v of  CE(T(v(x)), y) + L_bn(v(x))      of the finished images x(rho)
    rho    = argmin J over  rho_0 2^k,  k = -n/2 .. n/2                       rho_0 of --guidance-step

Guidance lowers its own losses the more, the longer its steps; under views that it never had it lowers them only as long
as what it draws is of the class. L_bn is the relative distance of BatchNorm statistics, of all trial images together;
it is left out where no loss of the run needs them. All lengths are tried on the same images, which are none of a run's.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dfkd.synthesis.bn_statistics import averaged, bn_distance, joined, record_bn_inputs
from dfkd.synthesis.filter import unguided_view
from dfkd.synthesis.finite import NotFinite
from dfkd.synthesis.losses import cross_entropy
from dfkd.synthesis.synthesizer import Sample, rounded
from dfkd.synthesis.views import seen

if TYPE_CHECKING:
    from dfkd.synthesis.pipeline import GuidedPipeline

FIRST_ID = 1 << 61  # images of runs, and their candidates, lie below
IMAGES, VIEWS = 32, 4  # of a trial: at least so many images, in whole groups


def try_steps(pipe: "GuidedPipeline", seed: int, say: Callable[[str], object]) -> dict[str, Any]:
    """Try the lengths, leave the pipeline at the best one, and return what a folder has on record of it.

    {"guidance_step": length, "step_trials": {length: J, None of images that are not finite}}. Raises NotFinite where no
    length gives finite images, and ShortMemory.
    """
    config, started, count = pipe.config.guidance, time.perf_counter(), images_of(pipe)
    turn = pipe.group * len(pipe.classes)
    first = FIRST_ID // turn * turn
    tried, pipe.prepared = lengths(config.step, config.step_trials), True
    found: dict[float, float] = {}
    for length in tried:
        pipe.guidance_step = length
        try:
            found[length] = judged(pipe, pipe(range(first, first + count), seed=seed), seed)
        except NotFinite:
            if length == tried[-1] and not found:
                raise
    best = pipe.guidance_step = min(found, key=found.__getitem__)
    scores = {f"{length:.6g}": rounded(found[length]) if length in found else None for length in tried}
    each = ", ".join(f"{name} {'not finite' if score is None else f'{score:.3g}'}" for name, score in scores.items())
    spent = f"{count} images of each, {time.perf_counter() - started:.3g} s"
    say(f"step trials: --guidance-step {best:.6g} is taken ({each}; {spent})")
    if best in (tried[0], tried[-1]):
        say(f"step trials: {best:.6g} is at the end of them, and what lies beyond was not tried; begin from it")
    return {"guidance_step": best, "step_trials": scores}


def images_of(pipe: "GuidedPipeline") -> int:
    """Images of one trial: whole groups."""
    return -(-IMAGES // pipe.group) * pipe.group


def lengths(centre: float, trials: int) -> list[float]:
    """`trials` lengths around `centre`, each twice the one before; of an even number one more lies below it."""
    return [centre * 2.0 ** (k - trials // 2) for k in range(trials)]


@torch.no_grad()
def judged(pipe: "GuidedPipeline", sample: Sample, seed: int) -> float:
    """J of finished images, which are read in calls of the pipeline's `call_size`."""
    teacher, ids = pipe.teacher, torch.tensor([record.id for record in sample.records])
    layers = pipe.guidance.layers if pipe.guidance is not None else ()
    total = 0.0
    for view in range(VIEWS):
        logits, moments = [], []
        for cut in torch.split(torch.arange(len(sample)), pipe.call_size):
            images = sample.images[cut].to(teacher.device).float() / 255
            moved = unguided_view(seed, ids[cut], view, images.shape[-1], flip=False).to(teacher.device)
            with record_bn_inputs(layers) as own:
                logits.append(teacher.logits(seen(images, moved)).float())
            moments.append(own)
        total += float(cross_entropy(torch.cat(logits), sample.labels.to(teacher.device)).mean())
        if layers:
            total += float(bn_distance(averaged(joined(moments)), layers, "relative").sum())
    return total / VIEWS
