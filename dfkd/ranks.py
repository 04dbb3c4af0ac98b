"""A process among those that torchrun started to share a work, told by the environment alone: nobody communicates."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rank:
    """Number ``number`` of ``count`` processes, ``local`` of the ``neighbours`` on this machine."""

    number: int = 0
    count: int = 1
    local: int = 0
    neighbours: int = 1

    @property
    def first(self) -> bool:
        """The one that speaks, and writes what there is one of."""
        return self.number == 0

    def owns(self, index: int) -> bool:
        """Is the work's part number ``index`` this process's?"""
        return index % self.count == self.number


def own_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """This process's; a process that torchrun did not start is alone."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return Rank()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Rank(*(int(environment[name]) for name in names))
