"""dfkd-generate: a frozen teacher, and a frozen diffusion prior, -> labelled synthetic images in shards."""

import sys
from collections.abc import Sequence
from typing import Any

from dfkd.cli.parse import command
from dfkd.cli.progress import progress, say
from dfkd.config import GenerateCommand
from dfkd.logs import LOG


def run(asked: GenerateCommand) -> dict[str, Any] | None:
    """Make the images, or say what that would take; only the first process of torchrun has a result."""
    from dfkd.runtime import own_rank
    from dfkd.synthesis import command as synthesis

    first = own_rank().first
    if asked.plan_only:
        return synthesis.plan(asked, say) if first else None
    with progress("synthesis", "img", first, asked.out / LOG) as draw:
        return synthesis.run(asked, say, draw)


def main(argv: Sequence[str] | None = None) -> None:
    sys.exit(command(GenerateCommand, run, "dfkd-generate", argv))


if __name__ == "__main__":
    main()
