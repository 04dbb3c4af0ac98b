"""dfkd-run: the whole job from one file."""

import sys
import tomllib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dfkd.cli.parse import command
from dfkd.cli.progress import progress, say
from dfkd.config import RunCommand
from dfkd.errors import UsageError

COMMAND = "dfkd-run"


def run(asked: RunCommand) -> dict[str, Any]:
    """Check every section, then do what is not done yet."""
    out = asked.out or Path("runs") / (asked.base or (asked.file or Path("mine")).stem)
    file = _read(asked.file) if asked.file else {"preset": asked.base}

    from dfkd.run import read_job, run_job

    job = read_job(file, out, asked.seed, asked.controls)
    with _Bars() as bars:
        return run_job(job, bars.draw, say)


class _Bars(ExitStack):
    """One bar at a time, for the stage that is at work."""

    stage = ""

    def draw(self, stage: str, done: int, total: int) -> None:
        if stage != self.stage:
            self.close()
            self.stage, self._bar = stage, self.enter_context(progress(stage, "it"))
        self._bar(done, total)


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
