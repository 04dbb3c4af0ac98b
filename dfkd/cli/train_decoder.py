"""dfkd-train-decoder: a prior -> a tiny decoder of its latents."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from dfkd.cli.parse import command, save_settings
from dfkd.cli.progress import progress, say
from dfkd.config import TrainDecoderCommand
from dfkd.logs import LOG

COMMAND = "dfkd-train-decoder"


def run(asked: TrainDecoderCommand) -> dict[str, Any] | None:
    """Draw, train what is not trained yet, write; the result, None in all processes but the first."""
    from dfkd.synthesis.command import quieten_libraries
    from dfkd.training.decoder import train_decoder
    from dfkd.training.folder import read_result
    from dfkd.training.world import join
    from dfkd_engine.priors.prior import Prior

    quieten_libraries()
    config = asked.training
    with join(config.train.compute.device) as world:
        prior = Prior.from_pretrained(asked.prior.source, device=world.device, **asked.prior.files())
        speak = say if world.first else (lambda text: None)
        with progress("training", "img", world.first, asked.out / LOG) as draw:
            train_decoder(
                prior,
                config,
                asked.out,
                world=world,
                progress=draw,
                say=speak,
                on_new=partial(save_settings, asked, asked.out, COMMAND),
            )
        return read_result(asked.out) if world.first else None


def main(argv: Sequence[str] | None = None) -> None:
    sys.exit(command(TrainDecoderCommand, run, COMMAND, argv))


if __name__ == "__main__":
    main()
