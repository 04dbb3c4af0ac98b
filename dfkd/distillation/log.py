"""OUT/log.jsonl: what a run measured on its way, one JSON object per line; and the guard against a lost run."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfkd.errors import UsageError


class Log:
    """Appends lines; a resumed run first drops those of steps that it will repeat."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in _lines(path) if line["step"] <= step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._path = path

    def write(self, step: int, **measured: float) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **measured}) + "\n")


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


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break  # the line that was being written when the run was killed
    return lines
