"""What is seen of a synthesis while it runs: progress by parts of images, every shard's numbers, OUT/preview.png."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dfkd.data import Record
from dfkd.data.contact_sheet import preview
from dfkd.files import replace_file
from dfkd.logs import Logs

PREVIEW = "preview.png"
SHOWN_EVERY = 10  # shards between two pictures in TensorBoard and the like

Progress = Callable[[float, int], object]


class Watch:
    """Progress through `total` images: told before the first, after every call, and within one as far as it tells."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self._total, self._progress = 0, total, progress
        self.part(0)

    def add(self, images: int) -> None:
        """Images of a call that are done."""
        self.done += images
        self.part(0)

    def part(self, images: float) -> None:
        """Images, in parts, of the call that goes on."""
        if self._progress is not None:
            self._progress(self.done + images, self._total)


class ShardLog:
    """The shards of a run as they are made: their numbers to the logs, and their images to OUT/preview.png."""

    def __init__(self, out: Path, class_names: Sequence[str], logs: Logs) -> None:
        self._out, self._names, self._logs, self._shards = out, class_names, logs, 0

    def add(self, step: int, images: Tensor, records: Sequence[Record], seconds: float) -> None:
        """A shard's images uint8 [N, 3, H, W] on the CPU, and the seconds that they took. step: images until now."""
        self._logs.write(step, **measured(records, seconds))
        picture = preview(images, torch.tensor([record.label for record in records]), self._names)
        replace_file(self._out / PREVIEW, partial(picture.save, format="PNG", compress_level=1))
        if self._shards % SHOWN_EVERY == 0:
            self._logs.show(step, "images", partial(Image.Image.copy, picture))
        self._shards += 1


def measured(records: Sequence[Record], seconds: float) -> dict[str, float]:
    """A shard's numbers: images a second, and means of the teacher's probability and of the final losses."""
    columns = {"teacher_probability": [record.teacher_probability for record in records]}
    columns |= {name: [record.losses[name] for record in records] for name in records[0].losses}
    means = {name: sum(values) / len(values) for name, values in columns.items()}
    return {"images_per_second": len(records) / max(seconds, 1e-6), **means}
