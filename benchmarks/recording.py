"""What every benchmark tells: spreads in words, tables in Markdown, a file on record, JSON as the last line."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import name_of
from dfkd.files import replace_text

RESULTS = Path(__file__).parent / "results"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.{max(0, 2 - int(f'{value:.2e}'.partition('e')[2]))}f}"


def words(found: Mapping[str, float] | None) -> str:
    """A spread as text: median (least to greatest), or the median where that is all; a dash for none."""
    if not found or "min" not in found:
        return number(found["median"]) if found else "-"
    return f"{number(found['median'])} ({number(found['min'])} to {number(found['max'])})"


def scaled(value: float, unit: str = "") -> str:
    """Such as 12.3 G, of 12.3e9."""
    size, prefix = next(((s, p) for s, p in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= s), (1, ""))
    return f"{number(value / size)} {prefix}{unit}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table; None is a dash."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join("-" if cell is None else str(cell) for cell in row) + " |" for row in rows]


def taken_on(machine: Mapping[str, Any], command: str) -> str:
    """The last sentence under a table: the machine, and the command that measures it."""
    return (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}, {machine['date']}: "
        f"`{command}`."
    )


def not_measured(failures: Iterable[tuple[str, str]]) -> list[str]:
    """A list of what has no numbers, by reason. failures: name and reason."""
    found: dict[str, list[str]] = {}
    for name, why in failures:
        found.setdefault(why, []).append(name)
    return ["", "Not measured:", "", *(f"- {', '.join(names)}: {why}" for why, names in found.items())] if found else []


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """An argument's type: names of `known`, separated by commas."""

    def names(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; known are {', '.join(known)}")
        return text.split(",")

    return names


def finish(result: Mapping[str, Any], text: str, record: str = "") -> None:
    """The table on stderr, the result as the last line of stdout.

    record: where it is not "", the result is results/<record>-cpu.json too, or with the GPU's name.
    """
    print(text, file=sys.stderr)
    if record:
        kind = name_of(result["machine"]) if result["machine"]["kind"] == "cuda" else "cpu"
        replace_text(RESULTS / f"{record}-{kind}.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
