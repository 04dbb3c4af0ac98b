"""Ways to read the same shards into the same batches: ours, and what others would write. Used by bench_loader.

Every way gives an epoch of float32 [B, 3, S, S] batches on a device, cropped, flipped and normalised, and labels; with
the same number of workers (processes or threads) everywhere. Processes persist between epochs. For a GPU those of
others go through pinned memory.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dfkd.errors import UsageError
from dfkd.data.loader import Form, LoaderChoice, Order, dali, open_source, steps
from dfkd.data.shards import ShardPool, open_folder

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
OURS = ("dali", "resident", "torch")
OTHERS = ("DataLoader + PIL", "webdataset", "datasets")
Epoch = Callable[[], Iterable[Tensor]]


def epoch_of(way: str, folder: Path, batch: int, workers: int, device: torch.device = CPU) -> Epoch:
    """A function that gives the batches of one epoch; raises ImportError or UsageError where the way is not there."""
    if way in OURS:
        if way == "dali" and not dali.installed():
            raise UsageError("dali", "NVIDIA DALI is not installed")
        return _ours(way, folder, batch, workers, device)
    theirs = {"DataLoader + PIL": _plain, "webdataset": _webdataset, "datasets": _datasets}[way]
    options = {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": device.type == "cuda",
    }
    epoch = theirs(folder, batch, options)
    return lambda: (images.to(device, non_blocking=True) for images in epoch())


def _ours(way: str, folder: Path, batch: int, workers: int, device: torch.device) -> Epoch:
    pool = open_folder(folder)
    count, size = len(pool.ids), pool.image_size
    form = Form(size, MEAN, STD, device)
    source = open_source(LoaderChoice(way, ""), pool, torch.arange(count), form, "crop-flip", batch, workers)

    def epoch() -> Iterator[Tensor]:
        return (found.images for found in source.batches(steps(Order(0, count, batch, count), "crop-flip", size, 0)))

    return epoch


def viewed(pixels: Any) -> Tensor:
    """uint8 [S, S, 3] -> float32 [3, S, S]: one image at a time, as in a user's Dataset."""
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float().div_(255)
    side = image.shape[-1]
    pad = max(1, side // 8)
    top, left = (int(x) for x in torch.randint(0, 2 * pad + 1, (2,)))
    image = torch.nn.functional.pad(image, (pad, pad, pad, pad))[:, top : top + side, left : left + side]
    if torch.rand(()) < 0.5:
        image = image.flip(-1)
    return (image - 0.5) / 0.25


class _Images(Dataset[tuple[Tensor, int]]):
    def __init__(self, pool: ShardPool) -> None:
        self.pool = pool

    def __len__(self) -> int:
        return len(self.pool.ids)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        (data,) = self.pool.encoded(torch.tensor([position]))
        file = io.BytesIO(data.tobytes())
        pixels = np.load(file) if self.pool.image_format == "npy" else Image.open(file).convert("RGB")
        return viewed(pixels), int(self.pool.labels[position])


def _plain(folder: Path, batch: int, options: dict[str, Any]) -> Epoch:
    data = _Images(open_folder(folder))
    loader = DataLoader(data, batch, shuffle=True, **options)
    return lambda: (images for images, _ in loader)


def _webdataset(folder: Path, batch: int, options: dict[str, Any]) -> Epoch:
    import webdataset

    image_format = open_folder(folder).image_format
    files = [str(file) for file in sorted(folder.glob("*.tar"))]
    data = webdataset.WebDataset(files, shardshuffle=False, empty_check=False).shuffle(1000)
    data = data.decode("rgb8").to_tuple(image_format, "cls").map_tuple(viewed, int).batched(batch)
    loader = webdataset.WebLoader(data, batch_size=None, **options)
    return lambda: (images for images, _ in loader)


def _hugging_face_row(row: dict[str, Any], image_format: str) -> tuple[Tensor, int]:
    return viewed(np.asarray(row[image_format], np.uint8)), int(row["cls"])


def _collated(rows: list[dict[str, Any]], image_format: str) -> Tensor:
    return torch.stack([_hugging_face_row(row, image_format)[0] for row in rows])


def _datasets(folder: Path, batch: int, options: dict[str, Any]) -> Epoch:
    import datasets

    image_format = open_folder(folder).image_format
    files = [str(file) for file in sorted(folder.glob("*.tar"))]
    data = datasets.load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)
    data = data.select_columns([image_format, "cls"]).shuffle(seed=0, buffer_size=1000)
    collate = partial(_collated, image_format=image_format)
    loader = DataLoader(data, batch, **options, collate_fn=collate)
    return lambda: loader
