import math

import pytest

from dfkd.training.schedule import learning_rate

PARTS = (150 / 240, 180 / 240, 210 / 240)


def test_multistep_drops_at_the_published_epochs() -> None:
    rates = [learning_rate(epoch, 240, 0.2, "multistep", PARTS, 0) for epoch in range(240)]
    for first, last, rate in ((0, 149, 0.2), (150, 179, 0.02), (180, 209, 2e-3), (210, 239, 2e-4)):
        assert rates[first] == pytest.approx(rate) and rates[last] == pytest.approx(rate)


def test_cosine_falls_from_the_peak_to_nearly_nothing() -> None:
    rates = [learning_rate(step, 100, 1.0, "cosine", (), 0) for step in range(100)]
    assert rates[0] == 1 and rates[50] == pytest.approx(0.5)
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 1e-3


@pytest.mark.parametrize("kind", ["multistep", "cosine"])
def test_warm_up_rises_linearly_to_the_peak(kind: str) -> None:
    rates = [learning_rate(step, 100, 1.0, kind, PARTS, 4) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert math.isfinite(learning_rate(3, 4, 1.0, kind, PARTS, 10))  # a run shorter than its warm-up
