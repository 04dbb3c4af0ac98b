"""Every image as uint8 on the device; a batch is one gather there."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from dfkd.data.loader.contract import Batch, Form, Images
from dfkd.data.loader.order import Step
from dfkd.data.loader.pixels import read_pixels


class Resident:
    def __init__(self, data: Images, positions: Tensor, form: Form) -> None:
        self.form = form
        self.labels, self.ids = data.labels[positions].to(form.device), data.ids[positions]
        self._pool = read_pixels(data, positions, form.size).to(form.device)

    def batches(self, steps: Iterable[Step]) -> Iterator[Batch]:
        for step in steps:
            rows = step.positions.to(self.form.device, non_blocking=True)
            images = self.form.finish(self._pool.index_select(0, rows), step.views)  # whole rows at once
            yield Batch(images, self.labels[rows], self.ids[step.positions], step.random)
