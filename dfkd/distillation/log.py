"""The losses of a run on their way to its log, and the guard against a lost run."""

import torch
from torch import Tensor

from dfkd.errors import UsageError


class Losses:
    """The losses of a block of steps, left on the device: reading each at once would make a GPU wait for it."""

    def __init__(self) -> None:
        self._block: list[tuple[int, Tensor, Tensor]] = []

    def add(self, step: int, ids: Tensor, loss: Tensor) -> None:
        self._block.append((step, ids, loss.detach()))

    def mean(self, checkpoint: str) -> float:
        """The mean of the block, which it empties; raises UsageError naming step and ids of a loss that is not finite.

        checkpoint: in words, what there is to go back to.
        """
        block, self._block = self._block, []
        losses = torch.stack([loss for _, _, loss in block])
        finite = losses.isfinite()
        if not finite.all():
            step, ids, loss = block[int(finite.logical_not().nonzero()[0])]
            raise UsageError(
                f"the loss of step {step} is {float(loss)}",
                f"the run has diverged; images of that step: {', '.join(map(str, ids.tolist()))}",
                f"lower --lr or raise --warmup; {checkpoint}",
            )
        return float(losses.mean())
