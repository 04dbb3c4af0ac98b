"""Small folders of shards for tests."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from dfkd.data.shards import Record, ShardFolder

CLASS_NAMES = ("zero", "one", "two")
SETTINGS = {"seed": 7, "sampler": {"name": "ddim", "steps": 20}}


def open_for_writing(
    path: Path, count: int = 10, size: int = 8, image_format: str = "png", shard_size: int = 4, **settings: object
) -> ShardFolder:
    merged = {**SETTINGS, **settings}
    return ShardFolder.create_or_open(path, merged, CLASS_NAMES, size, image_format, count, shard_size)


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
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}
