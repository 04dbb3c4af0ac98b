"""dfkd-train-teacher: real images -> a teacher."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from dfkd.cli.parse import command, save_settings
from dfkd.cli.progress import progress, say
from dfkd.config import TrainTeacherCommand
from dfkd.logs import LOG

COMMAND = "dfkd-train-teacher"


def run(asked: TrainTeacherCommand) -> dict[str, Any] | None:
    """Train what is not trained yet, test, write; the result, None in all processes but the first."""
    from dfkd import teachers
    from dfkd.training.folder import read_result
    from dfkd.training.step import check_training
    from dfkd.training.teacher import train_teacher
    from dfkd.training.world import join

    config = asked.training
    with join(config.train.compute.device) as world:
        teachers.check(asked.architecture)
        check_training(config.train, world)
        speak = say if world.first else (lambda text: None)
        with progress("training", "img", world.first, asked.out / LOG) as draw:
            train_teacher(
                asked.data,
                config,
                asked.out,
                architecture=asked.architecture,
                input_size=asked.input_size,
                resize=asked.resize,
                world=world,
                progress=draw,
                say=speak,
                on_new=partial(save_settings, asked, asked.out, COMMAND),
            )
        return read_result(asked.out) if world.first else None


def main(argv: Sequence[str] | None = None) -> None:
    sys.exit(command(TrainTeacherCommand, run, COMMAND, argv))


if __name__ == "__main__":
    main()
