"""What a run tells on its way: OUT/log.jsonl always, TensorBoard and Weights & Biases where asked."""

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dfkd.training.settings import DistillSettings
from dfkd.errors import UsageError
from dfkd.training.log import Log

LOG = "log.jsonl"


class _Sink(Protocol):
    def write(self, step: int, measured: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Logs:
    """The same numbers to all of them; a run that goes on after ``step`` takes back what it will repeat."""

    def __init__(self, out: Path, step: int, settings: DistillSettings, identity: Mapping[str, Any]) -> None:
        self._log = Log(out / LOG, "step", step)
        self._sinks: list[_Sink] = []
        if settings.tensorboard:
            self._sinks.append(_TensorBoard(out, step))
        if settings.wandb is not None:
            self._sinks.append(_Wandb(settings.wandb, out, identity))

    def write(self, step: int, **measured: float) -> None:
        self._log.write(step, **measured)
        for sink in self._sinks:
            sink.write(step, measured)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def check_logs(settings: DistillSettings) -> None:
    """Raise UsageError where a log was asked for whose package is absent."""
    wanted = {"tensorboard": settings.tensorboard, "wandb": settings.wandb is not None}
    for package, asked in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise UsageError(
                f"--{package} needs the package {package}", "it is not installed", "pip install 'dfkd[logs]'"
            )


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
