"""Numbers that describe a run without any real image: what the images' records, the teacher and the student say.

BN gap, of a set of images to the teacher's training data, as BatchNorm remembers it:

    gap    = sqrt( mean over layers and channels of ((mean - rmean)/rstd)^2 + (std/rstd - 1)^2 )
    spread = mean over layers and channels of std/rstd

with the set's statistics of what enters each BatchNorm layer, and r for the running ones. A gap of 0 says "the same
statistics", of 1 "about one standard deviation off"; a spread below 1 says "less varied than the training data".
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dfkd.synthesis.bn_statistics import Moments, averaged, bn_distance, joined, record_bn_inputs
from dfkd.teachers import Classifier

BINS = 20  # of the histogram of probabilities
ROWS = 250  # images a forward pass
Z95 = 1.959964  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Confidence:
    """Teacher probabilities of the label over a set: `histogram` counts them in equal bins of [0, 1]."""

    mean: float
    median: float
    above_half: float
    above_nine_tenths: float
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class Band:
    """A loss over the guided steps: mean over the images, 10 % and 90 % quantiles; one value a step each."""

    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class TeacherView:
    """What a teacher makes of `images` images.

    agreement           share whose most probable class is their label
    probability         mean probability of the label
    gap, spread         BN gap and spread, see the head of the module; None for a teacher without BatchNorm
    layer_gaps          the gap of every BatchNorm layer, in definition order
    """

    images: int
    agreement: float
    probability: float
    gap: float | None
    spread: float | None
    layer_gaps: tuple[float, ...]


@dataclass(frozen=True)
class Confusion:
    """`count` images of `truth` were taken for `answer`; `share` of that class's images."""

    truth: str
    answer: str
    count: int
    share: float


def confidence(probabilities: npt.NDArray[np.float64]) -> Confidence:
    """Summary of probabilities [N] in [0, 1], N >= 1."""
    counts, _ = np.histogram(probabilities, bins=BINS, range=(0, 1))
    return Confidence(
        mean=float(probabilities.mean()),
        median=float(np.median(probabilities)),
        above_half=float((probabilities > 0.5).mean()),
        above_nine_tenths=float((probabilities > 0.9).mean()),
        histogram=tuple(counts.tolist()),
    )


def loss_bands(curves: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Band]:
    """Bands by loss of one curve per image; {} where no image was guided.

    Curves of one length alone, the commonest: the first images of a method that warms up have longer ones.
    """
    bands = {}
    for name in sorted({name for curve in curves for name in curve}):
        own = [curve[name] for curve in curves if name in curve]
        ((points, _),) = Counter(map(len, own)).most_common(1)
        values = np.array([curve for curve in own if len(curve) == points], np.float32)
        low, high = np.quantile(values, (0.1, 0.9), axis=0).tolist()
        bands[name] = Band(tuple(values.mean(0, dtype=np.float64).tolist()), tuple(low), tuple(high))
    return bands


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share in [0, 1] measured on `count` images (Wilson 1927)."""
    centre = share + Z95**2 / (2 * count)
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    scale = 1 + Z95**2 / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def top_confusions(matrix: Sequence[Sequence[int]], names: Sequence[str], most: int = 5) -> tuple[Confusion, ...]:
    """The most frequent mistakes, most frequent first; ties in the order of the classes."""
    found = [
        Confusion(names[i], names[j], count, count / sum(row))
        for i, row in enumerate(matrix)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return tuple(sorted(found, key=lambda confusion: -confusion.count)[:most])


@torch.no_grad()
def teacher_view(teacher: Classifier, read: Callable[[Tensor], Tensor], labels: Tensor, rows: Tensor) -> TeacherView:
    """Show a teacher, in evaluation mode, the images `read(rows)` uint8 [n, 3, H, W] with labels[rows].

    rows: int64 [n], n >= 1. The images are read and judged ROWS at a time, on the teacher's device.
    """
    layers = teacher.batch_norms()
    parts: list[list[Moments]] = []
    agreed, sure = 0, 0.0
    for part in torch.split(rows, ROWS):
        with record_bn_inputs(layers) as moments:
            probabilities = teacher(read(part)).float().softmax(1)
        parts.append(moments)
        truth = labels[part].to(probabilities.device)
        agreed += int((probabilities.argmax(1) == truth).sum())
        sure += float(probabilities.gather(1, truth[:, None]).double().sum())
    means = averaged(joined(parts))
    squares = [float(bn_distance([m], (layer,), "relative")) for m, layer in zip(means, layers, strict=True)]
    return TeacherView(
        images=len(rows),
        agreement=agreed / len(rows),
        probability=sure / len(rows),
        gap=math.sqrt(sum(squares) / len(squares)) if squares else None,
        spread=_spread(means, layers) if squares else None,
        layer_gaps=tuple(math.sqrt(square) for square in squares),
    )


def _spread(moments: Sequence[Moments], layers: Sequence[nn.BatchNorm2d]) -> float:
    ratios = []
    for recorded, layer in zip(moments, layers, strict=True):
        assert layer.running_var is not None
        variance = (recorded.m2 - recorded.m1.square()).clamp_min(0) + layer.eps
        ratios.append((variance / (layer.running_var.to(variance) + layer.eps)).sqrt().mean())
    return float(torch.stack(ratios).mean())
