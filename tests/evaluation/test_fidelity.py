"""Distances of sets of features: closed forms, and what each must see."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor, nn

from dfkd.errors import UsageError
from dfkd.evaluation.fidelity import diversity, features, fidelity, frechet, precision_recall
from dfkd.evaluation.metrics import ROWS
from dfkd.teachers import Classifier
from dfkd.teachers.committee import Committee


def normal(count: int, seed: int, width: int = 3) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(count: int, seed: int, width: int = 3) -> Tensor:
    """Rows whose mean is 0 and whose covariance is the identity, exactly."""
    rows = normal(count, seed, width)
    rows = rows - rows.mean(0)
    return rows @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(rows.T))).T


def test_frechet_of_gaussians_that_share_axes() -> None:
    first = whitened(50, 0)
    scale, shift = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64), torch.tensor([3.0, 0, 4], dtype=torch.float64)
    second = whitened(70, 1) * scale + shift  # |shift|^2 + the squares of the differences of standard deviations
    assert frechet(first, second) == pytest.approx(25 + 1 + 0 + 0.25, rel=1e-9)
    assert frechet(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_is_the_papers_formula_where_covariances_do_not_commute() -> None:
    first, second = normal(40, 0) @ normal(3, 5), normal(60, 1) @ normal(3, 6) + 1
    c, r = np.cov(first.numpy().T), np.cov(second.numpy().T)
    apart = (first.mean(0) - second.mean(0)).square().sum()
    wanted = float(apart) + np.trace(c + r - 2 * linalg.sqrtm(c @ r).real)
    assert frechet(first, second) == pytest.approx(wanted, rel=1e-8)
    assert frechet(second, first) == pytest.approx(wanted, rel=1e-8)


def test_frechet_of_one_feature_and_of_fewer_images_than_features() -> None:
    one = torch.tensor([[0.0], [2.0]], dtype=torch.float64)  # variance 2
    assert frechet(one, 3 * one + 1) == pytest.approx(3**2 + (3 - 1) ** 2 * 2)
    assert frechet(normal(4, 0, 10), normal(4, 1, 10)) > 0  # of no full rank


def test_precision_and_recall_of_a_line() -> None:
    """Real images at 0, 1, ... 9: each reaches to its third neighbour. Images near 0 to 3, and one far away."""
    real = torch.arange(10, dtype=torch.float64)[:, None]
    images = torch.tensor([0.5, 1.5, 2.5, 50.0], dtype=torch.float64)[:, None]
    precision, recall = precision_recall(images, real)
    assert precision == 0.75
    # the balls of images reach to 49.5, 48.5, 47.5 and 49.5: all real ones lie in one
    assert recall == 1
    apart = images[:3].repeat(2, 1) + torch.tensor([[0.0]] * 3 + [[0.1]] * 3, dtype=torch.float64)
    # third neighbours of 0.5, 0.6, 1.5, 1.6, 2.5, 2.6 are at 1.1, 1.0, 0.9 or 1.0, ...: from 0.5 - 1.1 to 2.6 + 1.1
    assert precision_recall(apart, real) == (1, 0.4)


def test_precision_sees_wrong_images_and_recall_missing_ones() -> None:
    real = normal(200, 0)
    few = real[:1] + 0.01 * normal(200, 1)
    assert precision_recall(few, real)[0] == 1 and precision_recall(few, real)[1] < 0.1
    far = torch.cat([real[:100] + 1e-6, real[:100] + 100])
    assert precision_recall(far, real)[0] == 0.5 and precision_recall(far, real)[1] > 0.9
    assert precision_recall(real, real) == (1, 1)


def test_diversity_is_the_mean_distance_within_a_class() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [100.0, 0.0], [100.0, 1.0], [7.0, 7.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 2])  # 5 and 1; class 2 has one image
    assert diversity(rows, labels, 2 * rows, labels) == pytest.approx(0.5)
    assert diversity(rows, labels, rows[:2], labels[:2]) == pytest.approx(1)  # of the shared class alone
    assert diversity(rows, labels, rows[:1], labels[:1]) is None
    squeezed = torch.where(labels[:, None] == 0, rows, 0 * rows)
    assert diversity(squeezed, labels, rows, labels) == pytest.approx(5 / 6)


def test_a_perfect_set_is_as_good_as_other_real_images() -> None:
    labels = torch.arange(400) % 4
    rows = 3 * normal(4, 9)[labels] + normal(400, 2)
    found = fidelity(rows[:200], labels[:200], rows[200:], labels[200:])
    assert found.frechet < 0.5 and found.precision > 0.8 and found.recall > 0.8  # of 200 samples of a law each
    assert found.diversity == pytest.approx(1, abs=0.1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x.mean((2, 3))).relu())
        return out


def test_features_are_what_enters_the_last_layer() -> None:
    torch.manual_seed(0)
    module = Net().eval()
    judge = Classifier(module, ("a", "b"), (0.5,) * 3, (0.25,) * 3, 4)
    images = torch.randint(0, 256, (ROWS + 3, 3, 4, 4), dtype=torch.uint8)
    rows = torch.arange(len(images)).flip(0)
    found = features(judge, images.__getitem__, rows)
    with torch.no_grad():
        wanted = module.body(((images[rows].float() / 255 - 0.5) / 0.25).mean((2, 3))).relu()
    assert torch.allclose(found, wanted.double(), atol=1e-6) and found.shape == (ROWS + 3, 5)
    assert not module.head._forward_pre_hooks
    assert math.isclose(frechet(found, wanted.double()), 0, abs_tol=1e-6)


def test_a_network_without_a_last_layer_is_refused() -> None:
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    judge = Classifier(pooled.eval(), ("a", "b", "c"), (0,) * 3, (1,) * 3, 4, "pooled")
    with pytest.raises(UsageError, match="pooled has no linear layer"):
        features(judge, torch.zeros(1, 3, 4, 4, dtype=torch.uint8).__getitem__, torch.arange(1))


def test_several_teachers_have_no_features_of_their_own() -> None:
    member = Classifier(Net().eval(), ("a", "b"), (0,) * 3, (1,) * 3, 4)
    assert member.last_linear() is member.module.head and Committee.of([member, member]).last_linear() is None
