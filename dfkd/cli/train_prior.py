"""dfkd-train-prior: images -> a diffusion prior."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from dfkd.cli.parse import command, save_settings
from dfkd.cli.progress import progress, say
from dfkd.config import TrainPriorCommand
from dfkd.logs import LOG

COMMAND = "dfkd-train-prior"


def run(asked: TrainPriorCommand) -> dict[str, Any] | None:
    """Train what is not trained yet, write the pipeline; the result, None in all processes but the first."""
    from dfkd.synthesis.command import quieten_libraries
    from dfkd.training.folder import read_result
    from dfkd.training.prior import train_prior
    from dfkd.training.world import join

    quieten_libraries()
    config = asked.training
    with join(config.train.compute.device) as world:
        speak = say if world.first else (lambda text: None)
        with progress("training", "img", world.first, asked.out / LOG) as draw:
            train_prior(
                asked.data,
                config,
                asked.out,
                size=asked.size,
                prior=asked.prior,
                files=asked.files.files(),
                judge=asked.judge,
                world=world,
                progress=draw,
                say=speak,
                on_new=partial(save_settings, asked, asked.out, COMMAND),
            )
        return read_result(asked.out) if world.first else None


def main(argv: Sequence[str] | None = None) -> None:
    sys.exit(command(TrainPriorCommand, run, COMMAND, argv))


if __name__ == "__main__":
    main()
