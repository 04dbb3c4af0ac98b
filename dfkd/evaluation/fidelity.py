"""How near a set of images is to real ones, in the features of a classifier: what enters its last linear layer.

    Frechet    |m - r|^2 + tr(C + R - 2 (C R)^1/2), means and covariances of both sets (arXiv 1706.08500, eq. 6)
    precision  share of the images within the ball of a real one; a ball reaches to its image's third nearest neighbour
    recall     share of the real images within the ball of an image (arXiv 1904.06991, eq. 1 and 2)
    diversity  mean distance of two images of a class, over that of two real ones: below 1 is less varied than real

All but diversity depend on the number of images, so that sets are compared with equally many. None is better than its
features: those of the teacher that guided the images may be pleased by what it was asked to please.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfkd.errors import UsageError
from dfkd.evaluation.metrics import ROWS
from dfkd.teachers import Classifier

NEAREST = 3  # the neighbour that a ball reaches to, as in arXiv 1904.06991
LEAST = NEAREST + 1  # images that this takes


@dataclass(frozen=True)
class Fidelity:
    """Of as many images as real ones; see the head of the module. diversity: None where no class has two of both."""

    frechet: float
    precision: float
    recall: float
    diversity: float | None


def fidelity(images: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor) -> Fidelity:
    """Of features [N, D] with labels int64 [N] beside those of real images, N >= LEAST each."""
    precision, recall = precision_recall(images, real)
    return Fidelity(frechet(images, real), precision, recall, diversity(images, labels, real, real_labels))


def check_features(classifier: Classifier) -> nn.Linear:
    """The layer that features enter. Raises UsageError for a classifier without a linear one of its classes."""
    if (last := classifier.last_linear()) is None:
        what = f"{classifier.architecture or classifier.source} has no linear layer of its classes at the end"
        raise UsageError(what, "features are what enters it", "give another network as --features")
    return last


@torch.no_grad()
def features(classifier: Classifier, read: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Features float64 [n, D], on the CPU, of the images `read(rows)` uint8 [n, 3, H, W], ROWS at a time.

    Raises UsageError for a classifier without a linear layer of its classes at the end.
    """
    last = check_features(classifier)
    found: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].flatten(1).double().cpu()))
    try:
        for part in torch.split(rows, ROWS):
            classifier(read(part))
    finally:
        handle.remove()
    return torch.cat(found)


def frechet(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two sets of features float64 [N, D], N >= 2."""
    apart = (first.mean(0) - second.mean(0)).square().sum()
    one, other = (torch.cov(rows.T, correction=1).reshape(rows.shape[1], -1) for rows in (first, second))
    # tr (C R)^1/2 by the symmetric C^1/2 R C^1/2, which has the same eigenvalues.
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ other @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float(apart + one.trace() + other.trace() - 2 * shared))


def precision_recall(images: Tensor, real: Tensor) -> tuple[float, float]:
    """Improved precision and recall of features [N, D] beside real ones [M, D], N, M >= LEAST."""
    apart = torch.cdist(images, real)
    return _covered(apart, _reach(real)), _covered(apart.T, _reach(images))


def diversity(images: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor) -> float | None:
    """Mean distance of two images of a class, over classes that both sets have two of, over that of real ones."""
    own, theirs = _spreads(images, labels), _spreads(real, real_labels)
    shared = own.keys() & theirs.keys()
    whole = sum(theirs[label] for label in shared)
    return sum(own[label] for label in shared) / whole if whole else None


def _covered(apart: Tensor, reach: Tensor) -> float:
    """Share of the rows of distances [N, M] that lie within the ball of any column, whose radii are [M]."""
    return float((apart <= reach).any(1).double().mean())


def _reach(rows: Tensor) -> Tensor:
    """Distance [N] of each of N rows to its NEAREST-th neighbour; the nearest of all is itself."""
    return torch.cdist(rows, rows).kthvalue(NEAREST + 1, dim=1).values


def _spreads(rows: Tensor, labels: Tensor) -> dict[int, float]:
    """Mean distance of two different images by class, of classes of two or more."""
    of_class = {label: rows[labels == label] for label in sorted(set(labels.tolist()))}
    return {label: float(torch.pdist(own).mean()) for label, own in of_class.items() if len(own) > 1}
