"""Learning rate as a pure function of the step."""

import math
from collections.abc import Sequence


def learning_rate(step: int, total: int, peak: float, kind: str, milestones: Sequence[float], warmup: int) -> float:
    """The rate of step 0 <= step < total.

    multistep: peak, x0.1 from each milestone (a part of the run) on; cosine: half a cosine from peak to 0. During the
    first ``warmup`` steps it is multiplied by (step + 1) / (warmup + 1), and the cosine begins after them.
    """
    rise = min(1.0, (step + 1) / (warmup + 1))
    if kind == "cosine":
        progress = max(0, step - warmup) / max(1, total - warmup)
        return peak * rise * (1 + math.cos(math.pi * progress)) / 2
    return peak * rise * 0.1 ** sum(step >= round(part * total) for part in milestones)
