"""Images decoded by worker processes as they are needed (torch.utils.data.DataLoader)."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dfkd.errors import UsageError
from dfkd.data.loader.contract import Batch, Form, Images
from dfkd.data.loader.order import Step
from dfkd.data.loader.pixels import read_pixels


class Workers:
    """workers: processes; 0 decodes in this one, when a batch is asked for. Views are applied on the device."""

    def __init__(self, data: Images, positions: Tensor, form: Form, workers: int) -> None:
        self.form = form
        self.labels, self.ids = data.labels[positions], data.ids[positions]
        self._plan = _Plan()
        self._loader: DataLoader[Tensor | UsageError] = DataLoader(
            _Rows(data, positions, form.size),
            batch_sampler=self._plan,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=form.device.type == "cuda",
            persistent_workers=workers > 0,
        )

    def batches(self, steps: Iterable[Step]) -> Iterator[Batch]:
        self._plan.begin(steps)
        for pixels in self._loader:
            if isinstance(pixels, UsageError):
                raise pixels
            step = self._plan.asked.popleft()
            images = self.form.finish(pixels.to(self.form.device, non_blocking=True), step.views)
            labels = self.labels[step.positions].to(self.form.device, non_blocking=True)
            yield Batch(images, labels, self.ids[step.positions], step.random)


class _Plan:
    """The steps as torch's loader draws them: the positions go to the workers, the steps themselves stay here."""

    def __init__(self) -> None:
        self._steps: Iterable[Step] = ()
        self.asked: deque[Step] = deque()

    def begin(self, steps: Iterable[Step]) -> None:
        self._steps = steps
        self.asked.clear()

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            self.asked.append(step)
            yield step.positions.tolist()


class _Rows(Dataset[Tensor | UsageError]):
    def __init__(self, data: Images, positions: Tensor, size: int) -> None:
        self.data, self.positions, self.size = data, positions, size

    def __getitems__(self, rows: list[int]) -> Tensor | UsageError:
        """uint8 [B, size, size, 3]; an error travels as a value, since a worker's traceback would bury its words."""
        try:
            return read_pixels(self.data, self.positions[rows], self.size)
        except UsageError as error:
            return error


def _as_is(batch: Any) -> Any:
    return batch
