"""The loop that all benchmarks of time share: groups of rows, timed in turns beside the group's baseline.

A benchmark sets groups up; `measure` makes their rows and times them, `markdown` writes the table, `main` is its
command. Calls of a group run in turns in one process, and a row's ratio is taken within a turn, amount for amount, so
that both saw the same machine. Small calls are repeated until a clock sees them.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks import flops
from benchmarks.machine import describe
from benchmarks.recording import finish, not_measured, number, percent, scaled, spread, table, taken_on, words
from dfkd.errors import UsageError
from dfkd.runtime import resolve_device
from dfkd_engine.errors import EngineError

LEAST = 0.05  # seconds that a turn of a row lasts at least


@dataclass(frozen=True)
class Work:
    """call: what is timed. amount: how much of the group's unit it gets through. flop: of the call, 0 for unknown.

    facts: what else the table tells of the row, by column.
    """

    call: Callable[[], object]
    amount: float = 1.0
    flop: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Rows that do one thing in several ways, each made when its group's turn comes; making one is not timed.

    rows: by name; a maker raises where its row cannot be had here. baseline: the row that the others are compared with.
    unit: "images" or "bytes" a second are told. dtype: of networks, for the ceilings that FLOP/s are a share of: a
    square matmul in every turn, and the data sheet's peak; None: without.
    """

    name: str
    baseline: str
    rows: Mapping[str, Callable[[], Work]]
    unit: str = "images"
    dtype: torch.dtype | None = None


@dataclass
class _Row:
    """A row's numbers, one a turn."""

    work: Work
    ms: list[float] = field(default_factory=list)
    speed: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)

    def told(self, group: Group, name: str, peak: float | None) -> dict[str, Any]:
        """The row as it is recorded."""
        flop_per_second = 1000 * self.work.flop / median(self.ms) if self.work.flop else None
        return {
            "group": group.name,
            "name": name,
            "unit": group.unit,
            "ms": spread(self.ms),
            "per_second": spread(self.speed),
            "ratio": spread(self.ratio) if self.ratio else None,
            "baseline": name == group.baseline,
            "flop": self.work.flop or None,
            "flop_per_second": flop_per_second,
            "share_of_matmul": median(self.share) if self.share else None,
            "mfu": flop_per_second / peak if flop_per_second and peak else None,
            "facts": dict(self.work.facts),
        }


def measure(
    groups: Iterable[Group], device: torch.device, turns: int, passes: int = 1, least: float = LEAST
) -> Iterator[dict[str, Any]]:
    """{"turns", "rows", "failures"} after every group, as far as they are; failures have reasons.

    passes: how often all groups are gone through, every row made anew: half of its turns are then minutes from the
    others, in other memory, and so its spread has in it what would differ between two runs.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    kept: dict[tuple[str, str], _Row] = {}
    failures: dict[tuple[str, str], str] = {}
    for group in [group for _ in range(passes) for group in groups]:
        works, times, failed = _made(group, device, least)
        calls = {name: repeated(work.call, times[name]) for name, work in works.items()}
        ceiling, flop, peak = "", 1, None
        if group.dtype is not None:
            ceiling, peak = flops.precision(device, group.dtype), flops.peak(device, group.dtype)
            matmul, flop = flops.matmul(device, group.dtype)
            matmul()
            calls["matmul"] = matmul
        seconds, broken = flops.in_turns(calls, turns, device, warm=True)
        limit = [flop / s for s in seconds.pop("matmul", [])]
        base = [s / times[group.baseline] for s in seconds.get(group.baseline, [])]
        for name, spent in seconds.items():
            work, each = works[name], [s / times[name] for s in spent]
            row = kept.setdefault((group.name, name), _Row(work))
            row.ms += [1000 * s for s in each]
            row.speed += [work.amount / s for s in each]
            if base:
                of = works[group.baseline].amount
                row.ratio += [(b / of) / (s / work.amount) for b, s in zip(base, each, strict=True)]
            if limit and work.flop:
                row.share += [work.flop / s / top for s, top in zip(each, limit, strict=True)]
            rows[group.name, name] = row.told(group, name, peak) | ({"ceiling": ceiling} if ceiling else {})
        failures |= {(group.name, name): why for name, why in {**failed, **broken}.items()}
        absent = [{"group": of, "name": name, "why": why} for (of, name), why in failures.items()]
        yield {"turns": passes * turns, "rows": list(rows.values()), "failures": absent}


def _made(group: Group, device: torch.device, least: float) -> tuple[dict[str, Work], dict[str, int], dict[str, str]]:
    """The rows that can be had, how often a turn calls each, and reasons of the others."""
    works: dict[str, Work] = {}
    times: dict[str, int] = {}
    failed: dict[str, str] = {}
    for name, make in group.rows.items():
        try:
            work = make()
            works[name], times[name] = work, repeats(work.call, device, least)
        except Exception as error:  # compilers and other people's packages raise what they like
            failed[name] = str(error) if isinstance(error, (UsageError, EngineError)) else flops.reason(error)
        print(f"{group.name}: {name}: {failed.get(name, 'ready')}", file=sys.stderr, flush=True)
    return works, times, failed


def repeats(call: Callable[[], object], device: torch.device, least: float) -> int:
    """How many calls last `least` seconds, by the quickest of three after the first, which may compile or fill caches.

    Of a call that lasts much longer one is enough to say so.
    """
    flops.timed(call, device)
    seconds = flops.timed(call, device)
    if seconds < 10 * least:
        seconds = min(seconds, *(flops.timed(call, device) for _ in range(2)))  # one alone may have had to wait
    return max(1, math.ceil(least / max(seconds, 1e-9)))


def repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def markdown(result: Mapping[str, Any]) -> str:
    """The table of a result, with the columns that some row has; below it its note, the machine, what is not there."""
    rows = result["rows"]
    facts = list(dict.fromkeys(fact for row in rows for fact in row["facts"]))
    columns: dict[str, Callable[[Mapping[str, Any]], object]] = {
        "group": lambda r: r["group"],
        "row": lambda r: r["name"],
        "ms: median (min to max)": lambda r: words(r["ms"]),
        "a second": lambda r: _speed(r["per_second"]["median"], r["unit"]),
        "ratio": lambda r: "baseline" if r["baseline"] else words(r["ratio"]),
        "FLOP/s": lambda r: r["flop_per_second"] and scaled(r["flop_per_second"]),
        "of matmul": lambda r: r["share_of_matmul"] and percent(r["share_of_matmul"]),
        "MFU": lambda r: r["mfu"] and percent(r["mfu"]),
        **{fact: partial(lambda fact, r: _fact(r["facts"].get(fact)), fact) for fact in facts},
    }
    cells = {head: [cell(row) for row in rows] for head, cell in columns.items()}
    shown = [head for head, column in cells.items() if any(value is not None for value in column)]
    lines = table(shown, zip(*(cells[head] for head in shown), strict=True))
    under = f"Ratio: times as fast as the group's baseline in the same turns. {result['turns']} turns. {result['note']}"
    absent = [(f"{f['group']}: {f['name']}", f["why"]) for f in result["failures"]]
    return "\n".join([*lines, "", under + taken_on(result["machine"], result["command"]), *not_measured(absent)])


def _speed(value: float, unit: str) -> str:
    return scaled(value, "B") if unit == "bytes" else f"{number(value)} {unit}"


def _fact(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return number(value) if value >= 1e-2 else f"{value:.1e}"


def parser(doc: str | None, turns: int = 5) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:N")
    found.add_argument("--repeats", type=int, default=turns, help=f"turns (default {turns})")
    found.add_argument("--record", action="store_true", help="write it to benchmarks/results too")
    return found


def _device(name: str) -> torch.device:
    try:
        return resolve_device(name)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(groups: Iterable[Group], a: argparse.Namespace, module: str, record: str = "", note: str = "") -> None:
    """Measure and tell. A line of JSON follows every group, for who stops it; the last one is the whole.

    module: of benchmarks, the command. record: of the file's name, where --record is given.
    """
    machine = describe(a.device)  # before the work: what fails here must not lose it
    result: dict[str, Any] = {}
    for found in measure(groups, a.device, a.repeats):
        result = {"machine": machine, "command": f"python -m benchmarks.{module}", "note": note, **found}
        print(json.dumps(result), flush=True)
    finish(result, markdown(result), (record or module.removeprefix("bench_")) if a.record else "")
