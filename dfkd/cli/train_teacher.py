"""dfkd-train-teacher: real images -> a teacher."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dfkd.cli.parse import command
from dfkd.cli.training import Train, train_in_world
from dfkd.config import TrainTeacherCommand

if TYPE_CHECKING:
    from dfkd.training.world import World

COMMAND = "dfkd-train-teacher"


def run(asked: TrainTeacherCommand) -> dict[str, Any] | None:
    """Train what is not trained yet, test, write; the result, None in all processes but the first."""
    from dfkd import teachers
    from dfkd.training.step import check_training
    from dfkd.training.teacher import train_teacher

    def prepared(world: "World") -> Train:
        teachers.check(asked.architecture)
        check_training(asked.training.train, world)
        own: dict[str, Any] = {"input_size": asked.input_size, "resize": asked.resize}
        return partial(train_teacher, asked.data, asked.training, asked.out, architecture=asked.architecture, **own)

    return train_in_world(asked, asked.training.train, COMMAND, prepared)


def main(argv: Sequence[str] | None = None) -> None:
    sys.exit(command(TrainTeacherCommand, run, COMMAND, argv))


if __name__ == "__main__":
    main()
