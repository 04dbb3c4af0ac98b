"""A fixed, class-balanced cut of a labelled set into train, validation and test."""

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "validation", "test")


def stratified(labels: NDArray[np.int64], shares: tuple[float, float, float]) -> dict[str, NDArray[np.int64]]:
    """Indices per split; every class is cut in the given shares (rounded), which add up to 1.

    labels int64 [N] -> {split: int64 [n]}, disjoint and together all of range(N), in a fixed shuffled order.
    """
    # RandomState, not default_rng: NumPy promises that its stream never changes between versions.
    random = np.random.RandomState(0)
    parts: dict[str, list[NDArray[np.int64]]] = {split: [] for split in SPLITS}
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        first = round(len(members) * shares[0])
        second = first + round(len(members) * shares[1]) if shares[2] else len(members)
        for split, part in zip(SPLITS, np.split(members, [first, second]), strict=True):
            parts[split].append(part)
    return {split: random.permutation(np.concatenate(parts[split])).astype(np.int64) for split in SPLITS}
