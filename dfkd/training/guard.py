"""The guard of a training: it stops a run whose numbers are none any more."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dfkd.errors import UsageError

HOPELESS = 40  # skipped steps one after another: from 65536 the scale of fp16 falls to 6e-8 meanwhile


class Guard:
    """Collects the losses of steps on the device, and stops a run that has diverged.

    What it looks at is read a block of steps at a time: reading each would make a GPU wait.

    mean: of a tensor over the processes of the run. ids: of the images of a step. checkpoint: in words, what there is
    to go back to. skipped, pending: of the run that goes on.
    """

    def __init__(
        self,
        mean: Callable[[Tensor], Tensor],
        ids: Callable[[int], Sequence[int]],
        checkpoint: str,
        skipped: int = 0,
        pending: Sequence[tuple[int, Tensor]] = (),
    ) -> None:
        self._mean, self._ids, self._checkpoint = mean, ids, checkpoint
        self._skipped, self._block = skipped, list(pending)

    def add(self, step: int, loss: Tensor) -> None:
        """The loss of the batch that ended `step`, counted from 1; it stays on the device."""
        self._block.append((step, loss))

    def report(self, skipped: int) -> float:
        """The mean of the losses since the last report; skipped: how many steps of the run so far were.

        Raises UsageError with step and image ids where one is not finite, or where all of many steps were skipped.
        """
        losses, steps = self._judged(), len(self._block)
        lately, self._skipped = skipped - self._skipped, skipped
        if steps >= HOPELESS and lately >= steps:
            self._stop(self._block[-1][0], f"the gradients of the last {steps} steps are not finite at any scale")
        self._block = []
        return float(losses.mean())

    def pending(self) -> list[tuple[int, Tensor]]:
        """Step and loss, mean over the processes, of what the next report is on; raises as it does."""
        if not self._block:
            return []
        losses = self._judged()
        return [(step, loss.cpu()) for (step, _), loss in zip(self._block, losses, strict=True)]

    def check_weights(self, step: int, network: nn.Module) -> None:
        """Before a checkpoint: raise UsageError where the update of `step` left weights that are not finite.

        The loss, which was taken before the update, does not know it yet.
        """
        if not get_total_norm(network.parameters(), math.inf).isfinite():
            self._stop(step, f"the weights after step {step} are not finite")

    def _judged(self) -> Tensor:
        losses = self._mean(torch.stack([loss for _, loss in self._block]))
        finite = losses.isfinite()
        if not finite.all():
            at = int(finite.logical_not().nonzero()[0])
            self._stop(self._block[at][0], f"the loss of step {self._block[at][0]} is {float(losses[at])}")
        return losses

    def _stop(self, step: int, what: str) -> None:
        ids = list(self._ids(step))
        shown = ", ".join(map(str, ids[:10])) + (f", ... ({len(ids)} in all)" if len(ids) > 10 else "")
        raise UsageError(
            what,
            f"the run has diverged; images of step {step}: {shown}",
            f"lower --lr, raise --warmup or set --clip-norm; {self._checkpoint}",
        )
