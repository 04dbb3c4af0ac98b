"""Synthetic images kept out of training, for choosing a checkpoint without real data."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfkd.training.losses import kl_at_temperature
from dfkd.runtime import derived_seed
from dfkd.teachers.classifier import Classifier

ROWS = 500


def split(ids: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """Positions int64 for training and held out, ascending; the ids with the smallest hashes are held out.

    An image's place follows from its id and not from the run's seed, so that runs compare on the same images. At least
    one image is held out unless ``part`` is 0, and at least one is left for training.
    """
    count = min(len(ids) - 1, max(1, round(part * len(ids)))) if part else 0
    ranks = sorted(range(len(ids)), key=[derived_seed(0, "held-out", i) for i in ids.tolist()].__getitem__)
    return torch.tensor(sorted(ranks[count:]), dtype=torch.int64), torch.tensor(
        sorted(ranks[:count]), dtype=torch.int64
    )


@torch.no_grad()
def logits_of(classifier: Classifier, images: Tensor) -> Tensor:
    """Logits float32 [N, C] of images uint8 [N, 3, H, W], on the device of the network, which is in eval mode."""
    device = next(classifier.module.parameters()).device
    return torch.cat([classifier.logits(part.to(device).float() / 255).float() for part in torch.split(images, ROWS)])


def score(student: Tensor, teacher: Tensor, temperature: float) -> tuple[float, float]:
    """(agreement of the argmax in 0..1, minus the KL loss): compared in that order, more is better."""
    agreement = (student.argmax(1) == teacher.argmax(1)).float().mean()
    return float(agreement), -float(kl_at_temperature(student, teacher, temperature))


def confusion_matrix(labels: Tensor, predictions: Tensor, classes: int) -> Sequence[Sequence[int]]:
    """Row i, column j: how many images of class i were taken for class j; int64 [N] each."""
    counts = torch.bincount(labels * classes + predictions, minlength=classes**2)
    matrix: list[list[int]] = counts.view(classes, classes).tolist()
    return matrix
