"""Ways to read the same shards into the same batches: ours, and what others would write. Used by bench_loader.

Every way gives an epoch of float32 [B, 3, S, S] batches on a device, cropped, flipped and normalised; with the same
number of workers (processes or threads) everywhere. Processes persist between epochs. For a GPU those of others go
through pinned memory.
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

from dfkd.data import (
    Form,
    LoaderChoice,
    Order,
    ShardPool,
    dali_installed,
    open_folder,
    open_source,
    read_manifest,
    steps,
)
from dfkd.errors import UsageError

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
OURS = ("dali", "resident", "torch")
OTHERS = ("DataLoader + PIL", "webdataset", "datasets")
Epoch = Callable[[], Iterable[Tensor]]


def epoch_of(way: str, folder: Path, batch: int, workers: int, device: torch.device) -> Epoch:
    """A function that gives the batches of one epoch. Raises ImportError or UsageError where the way is not there."""
    if way in OURS:
        return _ours(way, open_folder(folder), batch, workers, device)
    options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": device.type == "cuda"}
    theirs = {"DataLoader + PIL": _plain, "webdataset": _webdataset, "datasets": _datasets}[way]
    batches = theirs(folder, read_manifest(folder)[0].image_format, batch, options)
    return lambda: (images.to(device, non_blocking=True) for images in batches)


def _ours(way: str, pool: ShardPool, batch: int, workers: int, device: torch.device) -> Epoch:
    if way == "dali" and not dali_installed():
        raise UsageError("NVIDIA DALI is not installed")
    count, size = len(pool.ids), pool.image_size
    form, order = Form(size, MEAN, STD, device), Order(0, count, batch, count)
    source = open_source(LoaderChoice(way, ""), pool, torch.arange(count), form, "crop-flip", batch, workers)

    def epoch() -> Iterator[Tensor]:
        return (found.images for found in source.batches(steps(order, "crop-flip", size, 0)))

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


class _Images(Dataset[Tensor]):
    def __init__(self, pool: ShardPool, image_format: str) -> None:
        self.pool, self.image_format = pool, image_format

    def __len__(self) -> int:
        return len(self.pool.ids)

    def __getitem__(self, position: int) -> Tensor:
        (data,) = self.pool.encoded(torch.tensor([position]))
        file = io.BytesIO(data.tobytes())
        return viewed(np.load(file) if self.image_format == "npy" else Image.open(file).convert("RGB"))


def _plain(folder: Path, image_format: str, batch: int, options: dict[str, Any]) -> Iterable[Tensor]:
    return DataLoader(_Images(open_folder(folder), image_format), batch, shuffle=True, **options)


def _webdataset(folder: Path, image_format: str, batch: int, options: dict[str, Any]) -> Iterable[Tensor]:
    import webdataset

    data = webdataset.WebDataset(files_of(folder), shardshuffle=False, empty_check=False).shuffle(1000)
    data = data.decode("rgb8").to_tuple(image_format).map_tuple(viewed).batched(batch).map(_first)
    batches: Iterable[Tensor] = webdataset.WebLoader(data, batch_size=None, **options)
    return batches


def _first(batch: Any) -> Any:
    return batch[0]


def _datasets(folder: Path, image_format: str, batch: int, options: dict[str, Any]) -> Iterable[Tensor]:
    import datasets

    data = datasets.load_dataset("webdataset", data_files={"train": files_of(folder)}, split="train", streaming=True)
    data = data.select_columns([image_format]).shuffle(seed=0, buffer_size=1000)
    return DataLoader(data, batch, **options, collate_fn=partial(_collated, image_format=image_format))


def _collated(rows: list[dict[str, Any]], image_format: str) -> Tensor:
    return torch.stack([viewed(np.asarray(row[image_format], np.uint8)) for row in rows])


def files_of(folder: Path) -> list[str]:
    return [str(file) for file in sorted(folder.glob("*.tar"))]
