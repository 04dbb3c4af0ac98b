import pytest

from dfkd.training.settings import COMPUTATION, DistillSettings
from dfkd.errors import UsageError


def test_defaults_are_the_published_ones() -> None:
    published = DistillSettings()
    assert (published.batch_size, published.lr, published.momentum, published.weight_decay) == (256, 0.2, 0.9, 5e-4)
    assert published.temperature == 30
    assert published.milestone_parts() == (150 / 240, 180 / 240, 210 / 240)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"steps": 10, "epochs": 2}, "--steps 10 and --epochs 2"),
        ({"ce_weight": 1.0, "mix": "mixup"}, "--ce-weight"),
        ({"milestones": ("150",)}, "'150'"),
        ({"milestones": ("a/b",)}, "'a/b'"),
        ({"milestones": ("1/0",)}, "'1/0'"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(given: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        DistillSettings(**given)  # type: ignore[arg-type]


def test_what_only_says_how_to_compute_is_a_setting() -> None:
    assert set(COMPUTATION) <= set(DistillSettings.__dataclass_fields__)
