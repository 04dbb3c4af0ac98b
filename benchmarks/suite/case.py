"""What the suite measures: groups of rows that do one thing in several ways, one of them the baseline."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


class Absent(Exception):
    """A row needs what is not here; its text says what."""


@dataclass(frozen=True)
class Place:
    """device: of all rows. quick: whether sizes are small. folder: an empty one, for what rows write."""

    device: torch.device
    quick: bool
    folder: Path


@dataclass(frozen=True)
class Work:
    """call: what is timed. amount: how much of the group's unit it gets through. calls: how many it stands for."""

    call: Callable[[], object]
    amount: float = 1.0
    calls: int = 1


@dataclass(frozen=True)
class Group:
    """Rows by name, each made when its turn comes; making one may take long, and is not timed.

    Rows raise Absent, ImportError, UsageError or EngineError where they cannot be had. baseline: the row that the
    others are compared with, amount for amount. unit: "images" or "bytes" a second are told; "" for neither.
    """

    name: str
    baseline: str
    rows: Mapping[str, Callable[[Place], Work]]
    unit: str = ""

    def __post_init__(self) -> None:
        if self.baseline not in self.rows:
            raise ValueError(f"group {self.name} has no row {self.baseline!r}, its baseline")


@dataclass(frozen=True)
class Case:
    """A row of a group."""

    group: Group
    name: str

    @property
    def is_baseline(self) -> bool:
        return self.name == self.group.baseline

    def __str__(self) -> str:
        return f"{self.group.name}: {self.name}"


def cases(groups: Iterable[Group]) -> list[Case]:
    """All rows, group by group, the baseline first. Raises ValueError for two groups of one name."""
    found: dict[str, list[Case]] = {}
    for group in groups:
        if group.name in found:
            raise ValueError(f"two groups are called {group.name}")
        names = dict.fromkeys([group.baseline, *group.rows])
        found[group.name] = [Case(group, name) for name in names]
    return [case for of_group in found.values() for case in of_group]
