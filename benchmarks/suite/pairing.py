"""Times in pairs: in every round the group's baseline just before the row, so that both see the same machine."""

import math
import time
from collections.abc import Callable, Sequence
from statistics import median

from benchmarks.flops import PAUSE

Call = Callable[[], object]
Timed = Callable[[Call], float]  # seconds of one call


class Pairing:
    """Rounds for pytest-benchmark's `pedantic`: `before` is its setup, the pairing itself what it times.

    rounds: seconds of the baseline (of the row again where there is none) and of the row, the warm-up among them.
    """

    def __init__(self, baseline: Call | None, row: Call, timed: Timed, pause: float = PAUSE) -> None:
        self.baseline, self.row, self.timed, self.pause = baseline, row, timed, pause
        self.rounds: list[tuple[float, float]] = []
        self._base = 0.0

    def before(self) -> None:
        if self.baseline is not None:
            time.sleep(self.pause)
            self._base = self.timed(self.baseline)
        time.sleep(self.pause)

    def __call__(self) -> None:
        seconds = self.timed(self.row)
        self.rounds.append((self._base if self.baseline is not None else seconds, seconds))


def repeats(call: Call, timed: Timed, least: float) -> int:
    """How many calls last `least` seconds, by the quickest of three after the first, which may compile or fill caches.

    Of a call that lasts much longer one is enough to say so.
    """
    timed(call)
    seconds = timed(call)
    if seconds < 10 * least:
        seconds = min(seconds, timed(call), timed(call))  # one alone may have waited for another process
    return max(1, math.ceil(least / max(seconds, 1e-9)))


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}
