"""Numbers of the report, on sets whose values are known."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfkd.evaluation.accuracy import evenly
from dfkd.evaluation.answers import class_accuracy
from dfkd.evaluation.metrics import BINS, Confusion, confidence, interval, loss_bands, teacher_view, top_confusions
from dfkd.teachers import Classifier

MATRIX = [[8, 2, 0], [0, 0, 0], [3, 1, 6]]


def classifier(*layers: nn.Module) -> Classifier:
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).eval()
    return Classifier(module, ("a", "b", "c"), (0.0,) * 3, (1.0,) * 3, 4)


def pictures(count: int = 601) -> Tensor:
    return torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_confidence_counts_every_image_once() -> None:
    found = confidence(np.array([0.0, 0.4, 0.6, 0.96, 1.0]))
    assert sum(found.histogram) == 5
    assert len(found.histogram) == BINS
    assert found.histogram[-1] == 2  # 0.96 and 1.0
    assert (found.above_half, found.above_nine_tenths, found.median) == (0.6, 0.4, 0.6)


def test_a_band_holds_the_middle_of_the_images() -> None:
    band = loss_bands([{"cls": [float(i), 2.0 * i]} for i in range(11)])["cls"]
    assert (band.mean, band.low, band.high) == ((5.0, 10.0), (1.0, 2.0), (9.0, 18.0))


def test_a_band_is_of_the_commonest_length() -> None:
    band = loss_bands([{"cls": [9.0, 9.0, 9.0]}, {"cls": [1.0, 2.0]}, {"cls": [1.0, 2.0]}])["cls"]
    assert band.mean == (1.0, 2.0)


def test_images_without_guidance_have_no_band() -> None:
    assert loss_bands([{}, {}]) == {}


def test_the_interval_is_wilsons() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263
    assert interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert interval(1.0, 20)[1] == 1.0


def test_confusions_are_ranked_and_empty_classes_have_no_accuracy() -> None:
    assert class_accuracy(MATRIX) == (0.8, None, 0.6)
    assert top_confusions(MATRIX, "abc", 2) == (Confusion("c", "a", 3, 0.3), Confusion("a", "b", 2, 0.2))


@pytest.mark.parametrize(("total", "most", "wanted"), [(3, 10, [0, 1, 2]), (10, 4, [0, 2, 5, 7]), (5, 0, [])])
def test_evenly_spreads_without_repeating(total: int, most: int, wanted: list[int]) -> None:
    assert evenly(total, most).tolist() == wanted


def test_the_gap_is_zero_where_the_statistics_are_the_running_ones() -> None:
    images = pictures()
    norm = nn.BatchNorm2d(3)
    x = images.double() / 255
    norm.running_mean = x.mean((0, 2, 3)).float()
    norm.running_var = x.var((0, 2, 3), correction=0).float()
    view = teacher_view(classifier(norm), images.__getitem__, torch.zeros(601).long(), torch.arange(601))
    assert view.gap == pytest.approx(0, abs=1e-4)  # float32 statistics of 9616 values
    assert view.spread == pytest.approx(1, abs=1e-4)


def test_the_gap_counts_shift_and_scale_in_running_standard_deviations() -> None:
    images = pictures()
    norm = nn.BatchNorm2d(3, eps=0.0)
    x = images.double() / 255
    std = x.std((0, 2, 3), correction=0)
    norm.running_mean = (x.mean((0, 2, 3)) - 3 * std / 2).float()  # three of its own deviations off
    norm.running_var = (std / 2).square().float()  # and twice as varied
    view = teacher_view(classifier(norm), images.__getitem__, torch.zeros(601).long(), torch.arange(601))
    assert view.gap == pytest.approx(math.sqrt(3**2 + 1**2), rel=1e-4)
    assert view.spread == pytest.approx(2, rel=1e-4)
    assert view.layer_gaps == (view.gap,)


class CalledBackwards(nn.Module):
    """Two BatchNorm layers of different width, defined in one order and called in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first, self.between = nn.BatchNorm2d(5), nn.BatchNorm2d(3), nn.Conv2d(3, 5, 1)
        self.after = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(self.second(self.between(self.first(x))))
        return out


def test_layers_are_matched_however_they_are_called() -> None:
    torch.manual_seed(0)
    view = teacher_view(classifier(CalledBackwards()), pictures().__getitem__, torch.zeros(601).long(), evenly(601, 9))
    assert view.images == 9
    assert len(view.layer_gaps) == 2


def test_agreement_and_probability_are_those_of_the_label() -> None:
    teacher = classifier(nn.ReLU())
    linear = teacher.module[-1]
    nn.init.zeros_(linear.weight)
    linear.bias.data = torch.tensor([0.0, math.log(2), 0.0])  # probabilities 1/4, 1/2, 1/4
    labels = torch.tensor([0, 1, 1, 2])
    view = teacher_view(teacher, pictures(4).__getitem__, labels, torch.arange(4))
    assert view.agreement == 0.5
    assert view.probability == pytest.approx(0.375)
    assert (view.gap, view.spread, view.layer_gaps) == (None, None, ())
