"""Data sets whose files hold the pixels of all images: CIFAR's pickles and binaries, MNIST's idx files.

Pickles are read without executing anything in them: what is no array, text or number is refused.
"""

import gzip
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfkd.config.lists import names_in
from dfkd.data.class_folders import read_names
from dfkd.data.image_files import Listing
from dfkd.data.list_files import numbered
from dfkd.errors import UsageError

ARRAYS = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
ARRAYS |= {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
ARRAYS |= {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}
CIFAR_FOLDERS = ("", "cifar-10-batches-py", "cifar-100-python", "cifar-10-batches-bin", "cifar-100-binary")
CIFAR_FILES = {"train": r"(data_batch_\d+|train)(\.bin)?", "test": r"(test_batch|test)(\.bin)?"}
CIFAR_NAMES = {"batches.meta": b"label_names", "meta": b"fine_label_names"}
IDX_FOLDERS = ("", "raw", "MNIST/raw", "FashionMNIST/raw")
IDX_FILES = {"train": "train", "test": "t10k"}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FASHION = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
# The files of MNIST and of Fashion-MNIST have the same names: their first labels tell them apart.
FIRST_LABELS = {
    (5, 0, 4, 1, 9, 2, 1, 3, 1, 4): DIGITS,
    (7, 2, 1, 0, 4, 1, 4, 9, 5, 9): DIGITS,
    (9, 0, 0, 3, 0, 2, 7, 2, 5, 5): FASHION,
    (9, 2, 1, 1, 6, 1, 4, 6, 5, 7): FASHION,
}


def cifar_files(root: Path) -> dict[str, list[Path]]:
    """The files of each split, in root or in the folder that the archives make there; {} for none."""
    for folder in (root / name for name in CIFAR_FOLDERS):
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        found = {
            split: [file for file in files if re.fullmatch(pattern, file.name) and file.is_file()]
            for split, pattern in CIFAR_FILES.items()
        }
        if any(found.values()):
            return {split: files for split, files in found.items() if files}
    return {}


def list_cifar(files: Sequence[Path]) -> Listing:
    """CIFAR-10 and CIFAR-100 in the form of torchvision's pickles or the .bin files; of the latter the fine labels.

    Class names come from the files beside them, else from the package. Raises UsageError for files of something else.
    """
    parts = [_cifar_binary(file) if file.suffix == ".bin" else _cifar_pickle(file) for file in files]
    pixels = np.concatenate([part[0] for part in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = [label for part in parts for label in part[1]]
    names = _cifar_names(files[0].parent) or names_in("cifar10" if "batch" in files[0].name else "cifar100")
    return numbered(list(np.ascontiguousarray(pixels)), labels, dict(enumerate(names)), _place(files))


def idx_files(root: Path) -> dict[str, list[Path]]:
    """The two files, images and labels, of each split; {} for none."""
    for folder in (root / name for name in IDX_FOLDERS):
        found = {}
        for split, word in IDX_FILES.items():
            pair = [sorted(folder.glob(f"{word}-{kind}[-.]idx?-ubyte*")) for kind in ("images", "labels")]
            if all(pair):
                found[split] = [files[0] for files in pair]
        if found:
            return found
    return {}


def list_idx(files: Sequence[Path]) -> Listing:
    """MNIST and sets in its form: grey images and labels, each an idx file, gzipped or not.

    Names are those of a classes.json beside them (read_names), else those of the ten digits or of Fashion-MNIST where
    the labels are, else numbers: a part of either set begins with other labels. Raises UsageError for files that hold
    something else.
    """
    images, labels = (_idx(file, dimensions) for file, dimensions in zip(files, (3, 1), strict=True))
    if len(images) != len(labels):
        raise UsageError(
            f"{files[0]} holds {len(images)} images", f"{files[1]} holds {len(labels)} labels", "pair them"
        )
    named = files[1].parent / "classes.json"
    known = dict(enumerate(FIRST_LABELS.get(tuple(labels[:10].tolist()), ())))
    names = read_names(named) if named.exists() else known
    return numbered(list(images), labels.tolist(), names, _place(files[:1]))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, which is no array")
        return super().find_class(module, name)


def _unpickled(file: Path) -> dict[bytes, Any]:
    try:
        with file.open("rb") as opened:
            found = _Unpickler(opened, encoding="bytes").load()
    except Exception as error:  # damaged bytes raise whatever they happen to call
        raise UsageError(f"{file} is no file of CIFAR", str(error) or type(error).__name__) from None
    if not isinstance(found, dict):
        raise UsageError(f"{file} is no file of CIFAR", f"it holds a {type(found).__name__}")
    return {key.encode() if isinstance(key, str) else key: value for key, value in found.items()}


def _cifar_pickle(file: Path) -> tuple[NDArray[np.uint8], list[int]]:
    found = _unpickled(file)
    labels = found.get(b"labels", found.get(b"fine_labels"))
    data = found.get(b"data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,) or labels is None:
        raise UsageError(f"{file} is no file of CIFAR", "wanted are data uint8 [N, 3072] and labels or fine_labels")
    if len(labels) != len(data):
        raise UsageError(f"{file} holds {len(data)} images", f"and {len(labels)} labels")
    return data, [int(label) for label in labels]


def _cifar_binary(file: Path) -> tuple[NDArray[np.uint8], list[int]]:
    """Rows of one label (CIFAR-10), or of a coarse and a fine one (CIFAR-100), and 3072 pixels."""
    before = 1 if "batch" in file.name else 2
    data = np.frombuffer(file.read_bytes(), np.uint8)
    if not len(data) or len(data) % (before + 3072):
        raise UsageError(f"{file} is no file of CIFAR", f"{len(data)} bytes are not rows of {before + 3072}")
    rows = data.reshape(-1, before + 3072)
    return rows[:, before:], rows[:, before - 1].tolist()


def _cifar_names(folder: Path) -> list[str]:
    for name in ("batches.meta.txt", "fine_label_names.txt"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8").split()
    for name, key in CIFAR_NAMES.items():
        if (folder / name).is_file():
            return [text.decode() if isinstance(text, bytes) else text for text in _unpickled(folder / name)[key]]
    return []


def _idx(file: Path, dimensions: int) -> NDArray[np.uint8]:
    """An idx file of bytes: two zeros, 8 for unsigned bytes, the number of dimensions, each as 4 bytes, the values."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError) as error:
        raise UsageError(f"cannot read {file}", str(error)) from None
    shape = tuple(np.frombuffer(data, ">u4", dimensions, 4).tolist()) if len(data) >= 4 * (1 + dimensions) else ()
    values = np.frombuffer(data, np.uint8)[4 * (1 + dimensions) :]
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(values) != np.prod(shape):
        raise UsageError(
            f"{file} is no idx file", f"wanted are bytes in {dimensions} dimensions, of {shape or 'a header'}"
        )
    return values.reshape(shape)


def _place(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0].parent}/{{{','.join(file.name for file in files)}}}"
