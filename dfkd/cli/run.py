"""dfkd-run: the whole job from one file."""

import sys
import tomllib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dfkd.cli.parse import command
from dfkd.cli.progress import progress, say
from dfkd.config import RunCommand, section
from dfkd.errors import UsageError
from dfkd.logs import LOG

COMMAND = "dfkd-run"


def run(asked: RunCommand) -> dict[str, Any]:
    """Check every section, then do what is not done yet."""
    out = asked.out or Path("runs") / (asked.base or (asked.file or Path("mine")).stem)
    file: dict[str, Any] = _read(asked.file) if asked.file else {"preset": asked.base}
    if asked.data is not None:
        file["evaluate"] = {**section(file, "evaluate"), "data": asked.data}

    from dfkd.run import read_job, run_job

    job = read_job(file, out, asked.seed, asked.controls)
    with _Bars(out) as bars:
        return run_job(job, bars.draw, say)


class _Bars(ExitStack):
    """One bar at a time, for the stage that is at work in the run's folder."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.out, self.stage = out, ""

    def draw(self, stage: str, done: float, total: int) -> None:
        if stage != self.stage:
            self.close()
            self.stage, self._bar = stage, self.enter_context(progress(stage, "img", log=log_of(self.out, stage)))
        self._bar(done, total)


def log_of(out: Path, stage: str) -> Path:
    """The log.jsonl of a stage: teacher, images and student, "refresh 001", or "NAME: images" of a baseline."""
    name, _, part = stage.rpartition(": ")
    if part.startswith("refresh "):
        return out / "rounds" / part.removeprefix("refresh ") / "student" / LOG
    folder = out / "baselines" / name if name else out
    return folder / {"images": "synthetic"}.get(part, part) / LOG


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}", error.strerror or str(error)) from None
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise UsageError(f"{path} is not TOML", str(error)) from None


def main(argv: Sequence[str] | None = None) -> None:
    """Exit with the command's status."""
    sys.exit(command(RunCommand, run, COMMAND, argv))


if __name__ == "__main__":
    main()
