"""One run of the suite: what is measured, row by row, and what is not, with the reason.

A round times the baseline and then the row, so that both see the same machine. The suite is gone through in TURNS, and
every row made anew in each: half of its rounds are minutes from the others, in other memory, and so its spread has in
it what would differ between two runs.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from benchmarks import flops
from benchmarks.bandwidth import repeated
from benchmarks.machine import describe
from benchmarks.recording import not_measured, number, scaled, spread, table, taken_on, words
from benchmarks.suite.case import Absent, Case, Group, Place, Work
from dfkd.errors import UsageError
from dfkd_engine.errors import EngineError

NOT_HERE = (Absent, ImportError, UsageError, EngineError)
TURNS, WARM_UP = 2, 1  # WARM_UP: rounds that are not counted
ROUNDS = {"quick": 5, "full": 8}  # of every row in a turn
LEAST = {"quick": 0.05, "full": 0.1}  # seconds that a round's calls last at least


class Rounds:
    """For pytest-benchmark's `pedantic`: `before` is its setup, the object itself what it times.

    found: seconds of the baseline (of the row again where there is none) and of the row, the warm-up among them.
    """

    def __init__(self, baseline: Callable[[], object] | None, row: Callable[[], object], timed: Any) -> None:
        self.baseline, self.row, self.timed, self._base = baseline, row, timed, 0.0
        self.found: list[tuple[float, float]] = []

    def before(self) -> None:
        if self.baseline is not None:
            time.sleep(flops.PAUSE)
            self._base = self.timed(self.baseline)
        time.sleep(flops.PAUSE)

    def __call__(self) -> None:
        seconds = self.timed(self.row)
        self.found.append((self._base if self.baseline is not None else seconds, seconds))


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
        """The row as it is recorded."""
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
    def suite(self) -> str:
        return "quick" if self.place.quick else "full"

    def measure(self, case: Case, pedantic: Callable[..., object]) -> list[float] | str:
        """A turn of a row: its ratio in every round; or why it cannot be had.

        pedantic: pytest-benchmark's, which runs the rounds.
        """
        try:
            base, work = self._works(case)
        except NOT_HERE as error:
            why = flops.reason(error) if isinstance(error, ImportError) else str(error)
            self.skipped[str(case)] = case, why
            return why
        rounds = Rounds(None if case.is_baseline else base.call, work.call, self._timed)
        pedantic(rounds, setup=rounds.before, rounds=ROUNDS[self.suite], warmup_rounds=WARM_UP, iterations=1)
        _, measured = self.measured.setdefault(str(case), (case, Measured()))
        measured.add(rounds.found[WARM_UP:], base, work)
        return measured.ratios[-ROUNDS[self.suite] :]

    def result(self) -> dict[str, Any]:
        """What is recorded."""
        absent = [{"group": case.group.name, "name": case.name, "why": why} for case, why in self.skipped.values()]
        return {
            "machine": describe(self.place.device),
            "suite": self.suite,
            "rounds": TURNS * ROUNDS[self.suite],
            "load": round(self.load, 2),
            "rows": [measured.row(case) for case, measured in self.measured.values()],
            "skipped": absent,
        }

    def _timed(self, call: Callable[[], object]) -> float:
        return flops.timed(call, self.place.device)

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
        times = repeats(work.call, self._timed, LEAST[self.suite])
        return replace(work, call=repeated(work.call, times), amount=work.amount * times, calls=times)


def repeats(call: Callable[[], object], timed: Callable[[Any], float], least: float) -> int:
    """How many calls last `least` seconds, by the quickest of three after the first, which may compile or fill caches.

    Of a call that lasts much longer one is enough to say so.
    """
    timed(call)
    seconds = timed(call)
    if seconds < 10 * least:
        seconds = min(seconds, timed(call), timed(call))  # one alone may have waited for another process
    return max(1, math.ceil(least / max(seconds, 1e-9)))


def markdown(result: dict[str, Any]) -> str:
    """One table, and below it what was not measured."""
    cells = [
        [r["group"], r["name"], words(r["milliseconds"]), "baseline" if r["baseline"] else words(r["ratio"]), _rate(r)]
        for r in result["rows"]
    ]
    command = "make bench" if result["suite"] == "full" else "make bench ARGS=--quick"
    under = (
        f"Ratio: times as fast as the group's baseline in the same rounds. {result['suite'].capitalize()} suite, "
        f"{result['rounds']} rounds a row, load {result['load']} before it began, "
    )
    lines = table(["group", "row", "ms: median (min to max)", "ratio", "a second"], cells)
    lines += ["", under + taken_on(result["machine"], command)]
    absent = [(f"{s['group']}: {s['name']}", s["why"]) for s in result["skipped"]]
    return "\n".join(lines + not_measured(absent))


def _rate(row: dict[str, Any]) -> str | None:
    if "images_per_second" in row:
        return f"{number(row['images_per_second'])} images"
    return scaled(row["bytes_per_second"], "B") if "bytes_per_second" in row else None
