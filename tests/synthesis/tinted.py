"""A synthesizer without networks: its pixels tell which call made them, with how many threads."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dfkd.synthesis.synthesizer import Sample, records_of


class Tinted:
    """Pixels of channel 0: the id; 1: images of the call; 2: threads.

    group: images that interact. cuts: whether groups may be cut, so that it has a `call_size`. fits: images of a call
    that its memory holds. before: called with the ids of every call.
    """

    name, class_names, image_size = "tinted", ("zero", "one", "two"), 4

    def __init__(
        self,
        group: int = 4,
        cuts: bool = False,
        fits: int = 1000,
        shade: int = 0,
        before: Callable[[list[int]], object] = list,
    ) -> None:
        self.group, self.fits, self.shade, self.before = group, fits, shade, before
        self.calls: list[tuple[int, int]] = []  # first id and images of every call that was begun
        if cuts:
            self.call_size = 0

    def identity(self) -> Mapping[str, Any]:
        return {"shade": self.shade}

    def __call__(self, ids: Sequence[int], labels: Sequence[int] | None = None, seed: int = 0) -> Sample:
        numbers = list(ids)
        self.calls.append((numbers[0], len(numbers)))
        self.before(numbers)
        if min(getattr(self, "call_size", len(numbers)), len(numbers)) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
        images = torch.zeros(len(numbers), 3, 4, 4, dtype=torch.uint8)
        images[:, 0] = torch.tensor(numbers)[:, None, None]
        images[:, 1], images[:, 2] = len(numbers), torch.get_num_threads()
        found = torch.tensor([i % 3 for i in numbers] if labels is None else list(labels))
        return Sample(images, found, records_of(numbers, found, self.class_names, seed))
