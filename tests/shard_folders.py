"""Small folders of shards for tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dfkd.data import Record, ShardFolder
from dfkd.runtime import Rank

CLASS_NAMES = ("zero", "one", "two")
SETTINGS = {"seed": 7, "sampler": {"name": "ddim", "steps": 20}}


def open_for_writing(
    path: Path,
    count: int = 10,
    size: int = 8,
    image_format: str = "png",
    shard_size: int = 4,
    rank: Rank = Rank(),  # noqa: B008 (frozen)
    run: Mapping[str, Any] | None = None,
    **settings: object,
) -> ShardFolder:
    merged = {**SETTINGS, **settings}
    return ShardFolder.create_or_open(path, merged, CLASS_NAMES, size, image_format, count, shard_size, rank, run)


def sample(ids: range, size: int) -> tuple[npt.NDArray[np.uint8], list[Record]]:
    """Images and records that follow from the ids alone."""
    images = np.stack([np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8) for i in ids])
    records = [
        Record(
            id=i,
            label=i % 3,
            class_name=CLASS_NAMES[i % 3],
            seed=7,
            prompt=f"a photo of {CLASS_NAMES[i % 3]}",
            partner=i - 3 if i >= 3 else None,
            box=(0, 1, 2, 3) if i >= 3 else None,
            losses={"bn": 0.5, "ce": i / 8},
            loss_curve={"ce": [2.0, i / 8]},
            teacher_probability=0.75,
        )
        for i in ids
    ]
    return images, records


def fill(folder: ShardFolder) -> None:
    """Write what is missing."""
    for index in folder.missing():
        images, records = sample(folder.layout.ids(index), folder.layout.image_size)
        folder.write(index, images, records, seconds=1.5)


def make(path: Path, **options: object) -> Path:
    with open_for_writing(path, **options) as folder:  # type: ignore[arg-type]
        fill(folder)
    return path


def contents(path: Path) -> dict[str, bytes]:
    """The files directly in a folder, by name."""
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.is_file()}


def class_folders(path: Path, names: Sequence[str] = CLASS_NAMES, sizes: tuple[int, int] = (8, 8)) -> Path:
    """Four smooth random PNG images a class; the last one of each has the second size, in pixels."""
    for label, name in enumerate(names):
        (path / name).mkdir(parents=True)
        for i in range(4):
            coarse = np.random.default_rng(100 + 4 * label + i).integers(60, 200, (3, 3, 3), dtype=np.uint8)
            size = sizes[i == 3]
            Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(path / name / f"{i}.png")
    return path
