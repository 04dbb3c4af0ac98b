"""What a command lets a user say of its loader."""

from dataclasses import dataclass

from dfkd.cli.options import option
from dfkd.data.loader.choice import SOURCES


@dataclass(frozen=True)
class LoaderOptions:
    """How batches come, and not what is in them: these may change where a run goes on."""

    loader: str = option(
        "auto",
        "dali: images decoded and viewed ahead of the steps by NVIDIA DALI; resident: every image on the device; torch:"
        " decoded by worker processes; auto: by what fits into memory and is installed, and it says why",
        choices=SOURCES,
    )
    workers: int = option(2, "threads (dali) or processes (torch) that decode images", low=0)
