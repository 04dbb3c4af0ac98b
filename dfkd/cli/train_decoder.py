"""dfkd-train-decoder: a prior -> a tiny decoder of its latents."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dfkd.cli.parse import command
from dfkd.cli.training import Train, train_in_world
from dfkd.config import TrainDecoderCommand

if TYPE_CHECKING:
    from dfkd.training.world import World

COMMAND = "dfkd-train-decoder"


def run(asked: TrainDecoderCommand) -> dict[str, Any] | None:
    """Draw, train what is not trained yet, write; the result, None in all processes but the first."""
    from dfkd.synthesis.command import quieten_libraries
    from dfkd.training.decoder import train_decoder
    from dfkd_engine.priors.prior import Prior

    def prepared(world: "World") -> Train:
        prior = Prior.from_pretrained(asked.prior.source, device=world.device, **asked.prior.files())
        return partial(train_decoder, prior, asked.training, asked.out)

    quieten_libraries()
    return train_in_world(asked, asked.training.train, COMMAND, prepared)


def main(argv: Sequence[str] | None = None) -> None:
    sys.exit(command(TrainDecoderCommand, run, COMMAND, argv))


if __name__ == "__main__":
    main()
