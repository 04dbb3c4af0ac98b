"""One run of the suite: what is measured, row by row, and what is not, with the reason.

The suite is gone through in TURNS, and every row made anew in each: half of its rounds are minutes from the others, in
other memory, and so its spread has in it what would differ between two runs.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

from benchmarks import flops
from benchmarks.bandwidth import repeated
from benchmarks.flops import reason
from benchmarks.machine import describe
from benchmarks.suite.case import Absent, Case, Group, Place, Work
from benchmarks.suite.pairing import Pairing, repeats, spread
from dfkd.errors import UsageError
from dfkd_engine.errors import EngineError

NOT_HERE = (Absent, ImportError, UsageError, EngineError)
WARM_UP = 1  # rounds that are not counted


TURNS = 2


@dataclass(frozen=True)
class Effort:
    """rounds: of every row in a turn. least: seconds that a round's calls last at least."""

    rounds: int
    least: float


QUICK, FULL = Effort(5, 0.05), Effort(8, 0.1)


@dataclass
class Measured:
    """A row's numbers, one a round. ratios: times as fast as the baseline in the same round, amount for amount."""

    milliseconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    per_second: list[float] = field(default_factory=list)

    def add(self, rounds: list[tuple[float, float]], base: Work, work: Work) -> None:
        """rounds: seconds of the baseline and of the row."""
        for before, own in rounds:
            self.milliseconds.append(1000 * own / work.calls)
            self.ratios.append((before / base.amount) / (own / work.amount))
            self.per_second.append(work.amount / own)

    def row(self, case: Case) -> dict[str, Any]:
        """As it is recorded."""
        found: dict[str, Any] = {
            "group": case.group.name,
            "name": case.name,
            "baseline": case.is_baseline,
            "milliseconds": spread(self.milliseconds),
            "ratio": None if case.is_baseline else spread(self.ratios),
        }
        return found | ({f"{case.group.unit}_per_second": median(self.per_second)} if case.group.unit else {})


@dataclass
class Session:
    """measured: by row, named as a text. skipped: reasons by row. load: processes that wanted a core before it."""

    place: Place
    load: float = field(default_factory=lambda: os.getloadavg()[0])
    measured: dict[str, tuple[Case, Measured]] = field(default_factory=dict)
    skipped: dict[str, tuple[Case, str]] = field(default_factory=dict)
    _held: tuple[str, Work | None] = ("", None)  # the baseline of the group in hand

    @property
    def effort(self) -> Effort:
        return QUICK if self.place.quick else FULL

    def measure(self, case: Case, pedantic: Callable[..., object]) -> list[float] | str:
        """A turn of a row: its ratio in every round; or why it cannot be had.

        pedantic: pytest-benchmark's, which runs the rounds.
        """
        try:
            base, work = self._works(case)
        except NOT_HERE as error:
            why = reason(error) if isinstance(error, ImportError) else str(error)
            self.skipped[str(case)] = case, why
            return why
        pairing = Pairing(None if case.is_baseline else base.call, work.call, partial(flops.timed, device=self._device))
        pedantic(pairing, setup=pairing.before, rounds=self.effort.rounds, warmup_rounds=WARM_UP, iterations=1)
        _, measured = self.measured.setdefault(str(case), (case, Measured()))
        measured.add(pairing.rounds[WARM_UP:], base, work)
        return measured.ratios[-self.effort.rounds :]

    def result(self) -> dict[str, Any]:
        """What is recorded."""
        absent = [{"group": case.group.name, "name": case.name, "why": why} for case, why in self.skipped.values()]
        return {
            "machine": describe(self._device),
            "suite": "quick" if self.place.quick else "full",
            "rounds": TURNS * self.effort.rounds,
            "load": round(self.load, 2),
            "rows": [measured.row(case) for case, measured in self.measured.values()],
            "skipped": absent,
        }

    @property
    def _device(self) -> Any:
        return self.place.device

    def _works(self, case: Case) -> tuple[Work, Work]:
        """The baseline's work and the row's. A group's baseline is made once."""
        if self._held[0] != case.group.name:
            self._held = "", None  # frees the last group's before this one's is made
            self._held = case.group.name, self._made(case.group, case.group.baseline)
        base = self._held[1]
        assert base is not None
        return base, base if case.is_baseline else self._made(case.group, case.name)

    def _made(self, group: Group, name: str) -> Work:
        """A row's work, as often as a round wants it."""
        work = group.rows[name](self.place)
        times = repeats(work.call, partial(flops.timed, device=self._device), self.effort.least)
        return replace(work, call=repeated(work.call, times), amount=work.amount * times, calls=times)
