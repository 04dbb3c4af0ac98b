"""What a run tells on its way: log.jsonl always, TensorBoard and Weights & Biases, with pictures, where asked."""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dfkd.config import LoggingConfig
from dfkd.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

LOG = "log.jsonl"


class _Board(Protocol):
    def write(self, step: int, measured: Mapping[str, float]) -> None: ...

    def show(self, step: int, name: str, picture: "Image.Image") -> None: ...

    def close(self) -> None: ...


class Logs:
    """Numbers by step to every log that was asked for; a run that goes on after `step` takes back what it will repeat.

    A process that is not the first of its run has none: writing does nothing.
    """

    def __init__(self, out: Path, step: int, config: LoggingConfig, identity: Mapping[str, Any], first: bool) -> None:
        self._lines = _Lines(out, step) if first else None
        self._boards: list[_Board] = [_TensorBoard(out, step)] if first and config.tensorboard else []
        if first and config.wandb is not None:
            self._boards.append(_Wandb(config.wandb, out, identity))

    def write(self, step: int, **measured: float) -> None:
        """Numbers by name."""
        if self._lines is not None:
            self._lines.write(step, measured)
        for board in self._boards:
            board.write(step, measured)

    def show(self, step: int, name: str, picture: "Callable[[], Image.Image]") -> None:
        """A picture, which is made only where a log takes one."""
        if self._boards:
            shown = picture()
            for board in self._boards:
                board.show(step, name, shown)

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *error: object) -> None:
        for board in self._boards:
            board.close()


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

    def show(self, step: int, name: str, picture: "Image.Image") -> None:
        import numpy as np

        self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run named like its folder; the same folder and settings go on with the same one."""

    def __init__(self, project: str, out: Path, identity: Mapping[str, Any]) -> None:
        whose = hashlib.sha256(f"{out.resolve()} {json.dumps(identity, sort_keys=True)}".encode()).hexdigest()[:16]
        try:
            import wandb

            self._run = wandb.init(
                project=project, name=out.name, id=whose, resume="allow", dir=str(out), config=dict(identity)
            )
        except Exception as error:  # of its own imports, the network, the account, or whatever its service answers
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UsageError(
                f"--wandb {project} could not start", why, "log in (wandb login), or set WANDB_MODE=offline"
            ) from error

    def write(self, step: int, measured: Mapping[str, float]) -> None:
        self._run.log(dict(measured), step=step)

    def show(self, step: int, name: str, picture: "Image.Image") -> None:
        import wandb

        self._run.log({name: wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self._run.finish()
