"""One run of the suite: what is measured, row by row, and what is not, with the reason."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from benchmarks import flops
from benchmarks.bandwidth import repeated
from benchmarks.flops import reason
from benchmarks.machine import describe
from benchmarks.suite.case import Absent, Case, Group, Place, Work
from benchmarks.suite.pairing import Pairing, repeats, spread
from dfkd.errors import UsageError
from engine.errors import EngineError

NOT_HERE = (Absent, ImportError, UsageError, EngineError)
WARM_UP = 1  # rounds that are not counted


@dataclass(frozen=True)
class Effort:
    """rounds: of every row. least: seconds that a round's calls last at least."""

    rounds: int
    least: float


QUICK, FULL = Effort(9, 0.05), Effort(15, 0.1)


@dataclass
class Session:
    """rows, skipped: as in the recorded file. load: processes that wanted a core in the minute before it."""

    place: Place
    load: float = field(default_factory=lambda: os.getloadavg()[0])
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    _held: tuple[str, Work | None] = ("", None)  # the baseline of the group in hand

    @property
    def effort(self) -> Effort:
        return QUICK if self.place.quick else FULL

    def measure(self, case: Case, pedantic: Callable[..., object]) -> tuple[dict[str, Any], list[float]] | str:
        """The row as it is recorded, and its ratio in every round; or why it cannot be had.

        pedantic: pytest-benchmark's, which runs the rounds.
        """
        label = {"group": case.group.name, "name": case.name}
        try:
            base, work = self._works(case)
        except NOT_HERE as error:
            why = reason(error) if isinstance(error, ImportError) else str(error)
            self.skipped.append(label | {"why": why})
            return why
        pairing = Pairing(None if case.is_baseline else base.call, work.call, partial(flops.timed, device=self._device))
        pedantic(pairing, setup=pairing.before, rounds=self.effort.rounds, warmup_rounds=WARM_UP, iterations=1)
        found, ratios = row(case, pairing.rounds[WARM_UP:], base, work)
        self.rows.append(label | found)
        return self.rows[-1], ratios

    def result(self) -> dict[str, Any]:
        """What is recorded."""
        return {
            "machine": describe(self._device),
            "suite": "quick" if self.place.quick else "full",
            "rounds": self.effort.rounds,
            "load": round(self.load, 2),
            "rows": self.rows,
            "skipped": self.skipped,
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


def row(case: Case, rounds: list[tuple[float, float]], base: Work, work: Work) -> tuple[dict[str, Any], list[float]]:
    """Numbers of a row from its rounds, and ratios: times as fast as the baseline in each, amount for amount."""
    seconds = [own for _, own in rounds]
    ratios = [(before / base.amount) / (own / work.amount) for before, own in rounds]
    found: dict[str, Any] = {
        "baseline": case.is_baseline,
        "milliseconds": spread([1000 * own / work.calls for own in seconds]),
        "ratio": None if case.is_baseline else spread(ratios),
    }
    if case.group.unit:
        found[f"{case.group.unit}_per_second"] = work.amount / spread(seconds)["median"]
    return found, ratios
