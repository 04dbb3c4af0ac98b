"""What a training tells on its way: log.jsonl always, TensorBoard and Weights & Biases where asked; and the guard that
stops a run whose numbers are none any more."""

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dfkd.config import LoggingConfig
from dfkd.errors import UsageError
from dfkd.training.folder import LOG

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


class _Sink(Protocol):
    def write(self, step: int, measured: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Logs:
    """Numbers by step to every log that was asked for; a run that goes on after `step` takes back what it will repeat.

    A process that is not the first of its run has none: writing does nothing.
    """

    def __init__(self, out: Path, step: int, config: LoggingConfig, identity: Mapping[str, Any], first: bool) -> None:
        self._sinks: list[_Sink] = [_Lines(out, step)] if first else []
        if first and config.tensorboard:
            self._sinks.append(_TensorBoard(out, step))
        if first and config.wandb is not None:
            self._sinks.append(_Wandb(config.wandb, out, identity))

    def write(self, step: int, **measured: float) -> None:
        for sink in self._sinks:
            sink.write(step, measured)

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *error: object) -> None:
        for sink in self._sinks:
            sink.close()


def check_logs(config: LoggingConfig) -> None:
    """Raise UsageError where a log was asked for whose package is absent."""
    wanted = {"tensorboard": config.tensorboard, "wandb": config.wandb is not None}
    for package, asked in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise UsageError(
                f"--{package} needs the package {package}", "it is not installed", "pip install 'dfkd[logs]'"
            )


class _Lines:
    """OUT/log.jsonl, one JSON object a line."""

    def __init__(self, out: Path, step: int) -> None:
        self._path = out / LOG
        kept = [line for line in read_lines(self._path) if line["step"] <= step] if step else []
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, step: int, measured: Mapping[str, float]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **measured}) + "\n")

    def close(self) -> None:
        pass


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; [] where there is none. The last one, which a killed run left half, is dropped."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class _TensorBoard:
    """Event files in OUT/tensorboard."""

    def __init__(self, out: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, measured: Mapping[str, float]) -> None:
        for name, value in measured.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run named like its folder; the same folder and settings go on with the same one."""

    def __init__(self, project: str, out: Path, identity: Mapping[str, Any]) -> None:
        import wandb

        whose = hashlib.sha256(f"{out.resolve()} {json.dumps(identity, sort_keys=True)}".encode()).hexdigest()[:16]
        try:
            self._run = wandb.init(
                project=project, name=out.name, id=whose, resume="allow", dir=str(out), config=dict(identity)
            )
        except Exception as error:  # of the network, the account, or whatever its service answers
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UsageError(
                f"--wandb {project} could not start", why, "log in (wandb login), or set WANDB_MODE=offline"
            ) from error

    def write(self, step: int, measured: Mapping[str, float]) -> None:
        self._run.log(dict(measured), step=step)

    def close(self) -> None:
        self._run.finish()
