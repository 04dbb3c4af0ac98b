"""A test on labelled images: what is counted, classes by name, calibration by hand."""

import pytest
import torch
from torch import Tensor, nn

from dfkd.data import Pool
from dfkd.errors import UsageError
from dfkd.evaluation import evaluate
from dfkd.evaluation.accuracy import spread
from dfkd.evaluation.answers import Bin, Outcomes, calibration_error
from dfkd.teachers import Classifier

NAMES = ("red", "green", "blue")


class Colour(nn.Module):
    """The logits are the mean channels, times a factor: the brightest channel is the answer."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2), factor: float = 1.0) -> None:
        super().__init__()
        self.order, self.factor = list(order), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x.mean((2, 3))[:, self.order]


def judge(names: tuple[str, ...] = NAMES, size: int = 4, **kind: object) -> Classifier:
    return Classifier(Colour(**kind), names, (0.0,) * 3, (1.0,) * 3, size)


def pool(channels: list[int], labels: list[int], names: tuple[str, ...] = NAMES, size: int = 4) -> Pool:
    """Images that are bright in one channel each."""
    images = torch.zeros(len(channels), 3, size, size, dtype=torch.uint8)
    for image, channel in zip(images, channels, strict=True):
        image[channel] = 255
    return Pool(images, torch.tensor(labels), torch.arange(len(labels)), names)


def test_counts_by_hand() -> None:
    done: list[tuple[int, int]] = []
    found = evaluate(judge(), pool([0, 0, 1, 1], [0, 1, 1, 1]), progress=lambda *now: done.append(now))
    assert (found.accuracy, found.images, found.agreement, found.teacher_accuracy) == (0.75, 4, None, None)
    assert found.confusion == ((1, 0, 0), (1, 2, 0), (0, 0, 0))
    assert found.per_class == {"red": 1.0, "green": pytest.approx(2 / 3), "blue": None}
    assert done == [(4, 4)]


def test_classes_are_matched_by_name() -> None:
    shuffled = pool([0, 2, 2], [1, 0, 0], ("blue", "red"))
    assert evaluate(judge(), shuffled).accuracy == 1.0
    with pytest.raises(UsageError, match=r"classes pink.*the classifier knows red, green, blue"):
        evaluate(judge(), pool([0], [0], ("pink",)))


def test_agreement_goes_by_name_too() -> None:
    images = pool([0, 1, 2, 2], [0, 1, 2, 0])
    teacher = judge(("blue", "red", "green"), order=(2, 0, 1), size=8)
    found = evaluate(judge(), images, teacher=teacher)
    assert (found.agreement, found.teacher_accuracy) == (1.0, 0.75)
    assert evaluate(judge(), images, teacher=judge(("blue", "red", "green"))).agreement == 0.0
    with pytest.raises(UsageError, match="different classes"):
        evaluate(judge(), images, teacher=judge(("blue", "red", "pink")))


def test_teacher_wrong_and_student_wrong_part() -> None:
    images = pool([0, 1, 2, 2, 1, 0], [0, 1, 0, 1, 0, 1])
    found = evaluate(judge(order=(1, 0, 2)), images, teacher=judge())  # the student takes red for green
    assert found.outcomes == Outcomes(both_right=0, student_only=2, teacher_only=2, both_wrong=2, same_wrong=2)
    assert (found.accuracy, found.teacher_accuracy, found.agreement) == (2 / 6, 2 / 6, 2 / 6)
    assert found.teacher_per_class == {"red": 1 / 3, "green": 1 / 3, "blue": None}
    assert evaluate(judge(), images).outcomes is None


def test_a_limit_spreads_over_the_set() -> None:
    images = pool([0] * 10, [0] * 5 + [1] * 5)
    found = evaluate(judge(), images, limit=4)
    assert (found.images, found.accuracy) == (4, 0.5)


def test_calibration_is_the_gap_between_confidence_and_accuracy() -> None:
    right = torch.tensor([True] * 7 + [False] * 3)
    assert calibration_error(torch.full((10,), 0.7), right) == pytest.approx(0, abs=1e-6)
    assert calibration_error(torch.full((10,), 0.9), right) == pytest.approx(0.2, abs=1e-6)
    two = torch.tensor([0.5] * 5 + [1.0] * 5)  # accuracies 1.0 and 0.4
    assert calibration_error(two, right) == pytest.approx((0.5 + 0.6) / 2, abs=1e-6)
    sure = evaluate(judge(factor=100.0), pool([0, 1], [0, 1]), teacher=judge(factor=0.0))
    assert sure.calibration == pytest.approx(0, abs=1e-6) and sure.reliability == (Bin(2, 1.0, 1.0),)
    assert sure.teacher_calibration == pytest.approx(1 / 2 - 1 / 3, abs=1e-6)
    assert sure.teacher_reliability == (Bin(2, pytest.approx(1 / 3), 0.5),)


def test_a_named_data_set() -> None:
    digits = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    network = Classifier(module, digits, (0.5,) * 3, (0.5,) * 3, 32)
    found = evaluate(network, "digits-on-photos", split="validation", limit=50)
    assert found.images == 50 and sum(map(sum, found.confusion)) == 50


def test_images_are_chosen_from_every_class_whatever_its_turn() -> None:
    turns = torch.arange(2000) % 10  # at every fourth id there are even classes alone
    rows = spread(turns, 500)
    assert turns[rows].bincount().tolist() == [50] * 10 and len(rows.unique()) == 500
    for label in (0, 7):
        own = rows[turns[rows] == label].sort().values
        assert own.diff().unique().tolist() == [40]  # spread over the ids
    assert spread(torch.tensor([2, 0, 2, 1]), 9).tolist() == [1, 3, 0, 2]
