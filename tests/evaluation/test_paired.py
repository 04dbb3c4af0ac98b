"""Two classifiers on the same images, or over the same seeds: the difference and its interval."""

import math

import numpy as np
import pytest
from scipy import stats

from dfkd.evaluation.paired import Difference, difference, over_seeds


def masks(both: int, first: int, second: int, neither: int) -> "tuple[np.ndarray, np.ndarray]":
    parts = ((both, (True, True)), (first, (True, False)), (second, (False, True)), (neither, (False, False)))
    rows = np.array([pair for count, pair in parts for _ in range(count)])
    return rows[:, 0], rows[:, 1]


def test_the_interval_is_agresti_and_mins() -> None:
    # only the first has 10 of 100 right, only the second 4: (10.5 - 4.5) / 102, its error sqrt(15 - 36/102) / 102
    found = difference(*masks(60, 10, 4, 26))
    assert found == Difference(pytest.approx(0.06), pytest.approx(-0.01471, abs=5e-5), pytest.approx(0.13236, abs=5e-5))
    assert not found.shown and difference(*masks(60, 20, 4, 16)).shown


def test_it_agrees_with_a_bootstrap_over_the_images() -> None:
    one, other = masks(700, 120, 60, 120)
    rows = np.random.default_rng(0).integers(0, 1000, (4000, 1000))
    drawn = one[rows].mean(1) - other[rows].mean(1)
    found = difference(one, other)
    # the quantiles of 4000 draws are known to about 0.0005
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=2e-3)


def test_equals_are_not_told_apart_and_one_image_says_little() -> None:
    same = difference(*masks(9, 0, 0, 1))
    assert same.value == 0 and same.low == pytest.approx(-same.high) and not same.shown
    assert not difference(*masks(0, 1, 0, 0)).shown


def test_over_seeds_the_interval_is_that_of_the_paired_t_test() -> None:
    first, second = (0.61, 0.65, 0.60, 0.63, 0.66), (0.60, 0.62, 0.61, 0.60, 0.61)
    found, wanted = over_seeds(first, second), stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((0.022, wanted.low, wanted.high))
    assert found.known and not found.shown and over_seeds((0.9, 0.91), (0.1, 0.12)).shown


def test_one_seed_has_no_interval() -> None:
    found = over_seeds((0.5,), (0.25,))
    assert (found.value, found.low, found.high) == (0.25, -math.inf, math.inf)
    assert not found.known and not found.shown
