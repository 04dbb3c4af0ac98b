"""dfkd-train-prior: images -> a diffusion prior."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dfkd.cli.parse import command
from dfkd.cli.training import Train, train_in_world
from dfkd.config import TrainPriorCommand

if TYPE_CHECKING:
    from dfkd.training.world import World

COMMAND = "dfkd-train-prior"


def run(asked: TrainPriorCommand) -> dict[str, Any] | None:
    """Train what is not trained yet, write the pipeline; the result, None in all processes but the first."""
    from dfkd.synthesis.command import quieten_libraries
    from dfkd.training.prior import train_prior

    def prepared(world: "World") -> Train:
        own: dict[str, Any] = {"size": asked.size, "prior": asked.prior, "judge": asked.judge}
        return partial(train_prior, asked.data, asked.training, asked.out, files=asked.files.files(), **own)

    quieten_libraries()
    return train_in_world(asked, asked.training.train, COMMAND, prepared)


def main(argv: Sequence[str] | None = None) -> None:
    sys.exit(command(TrainPriorCommand, run, COMMAND, argv))


if __name__ == "__main__":
    main()
