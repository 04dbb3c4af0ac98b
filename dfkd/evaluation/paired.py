"""Two classifiers on the same images, or two ways over the same seeds: how much better one is, and how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dfkd.evaluation.metrics import Z95


@dataclass(frozen=True)
class Difference:
    """Accuracy of the first minus that of the second, in -1..1, with its 95 % interval, infinite where one pair says
    nothing of others."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low)

    @property
    def shown(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def difference(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> Difference:
    """How far the first is ahead of the second, with a 95 % interval, from which of N >= 1 images each has right, [N].

    McNemar's setting: only images that one of the two has right count. Interval of Agresti and Min (Statistics in
    Medicine 24, 2005), Wald's after half an image more in each cell of the table, which holds for few images too.
    """
    count, one, other = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    total, gap, apart = count + 2, one - other, one + other + 1
    half = Z95 * math.sqrt(apart - gap**2 / total) / total
    return Difference(gap / count, max(-1.0, gap / total - half), min(1.0, gap / total + half))


def over_seeds(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Mean of the differences of pairs, one or more, such as accuracies of the same seeds, with a 95 % interval.

    Student's t of the differences, for the choice of seeds; infinite for one pair.
    """
    from scipy import stats  # takes most of a second, which reports of one run can do without

    pairs = [one - other for one, other in zip(first, second, strict=True)]
    value = sum(pairs) / len(pairs)
    half = float(stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(pairs)) if len(pairs) > 1 else math.inf
    return Difference(value, value - half, value + half)
