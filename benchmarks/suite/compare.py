"""Two results of the suite: which rows are slower or faster, as ratios to their groups' baselines.

    python -m benchmarks.suite.compare before.json after.json      exits with 1 where rows differ, slowest change first

A row differs where the spreads of its ratio (least to greatest, as printed) do not overlap. A baseline has no ratio and
is compared with nothing: a slower machine is no slower part. Where all rows of a group differ in one direction, its
baseline is what changed.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.recording import words

SUITES = ("quick", "full")
FEW = 5  # rows of one result alone that are named


@dataclass(frozen=True)
class Change:
    """A row that both results have. before, after: {"median", "min", "max"} of its ratio."""

    group: str
    name: str
    before: dict[str, float]
    after: dict[str, float]

    @property
    def verdict(self) -> str:
        """ "slower", "faster", or "" where the spreads overlap."""
        if printed(self.after["max"]) < printed(self.before["min"]):
            return "slower"
        return "faster" if printed(self.after["min"]) > printed(self.before["max"]) else ""

    @property
    def factor(self) -> float:
        """How many times as fast as before; below 1 is slower."""
        return self.after["median"] / self.before["median"]

    def __str__(self) -> str:
        before, after = words(self.before), words(self.after)
        return f"{self.group}: {self.name} is {self.verdict}: ratio {before} before, {after} now"


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Rows with a ratio in both, the slowest change first. Raises ValueError: one is quick, the other full."""
    if before["suite"] != after["suite"]:
        raise ValueError(f"one is of the {before['suite']} suite, the other of the {after['suite']} one: sizes differ")
    known = ratios(before)
    found = [Change(*key, known[key], ratio) for key, ratio in ratios(after).items() if key in known]
    return sorted(found, key=lambda change: change.factor)


def ratios(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """By group and name, of all but baselines."""
    return {(r["group"], r["name"]): r["ratio"] for r in result["rows"] if not r["baseline"]}


def report(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[str], bool]:
    """Lines that name the rows that differ and the rows of one result alone; and whether any differs."""
    changes = compare(before, after)
    differing = [change for change in changes if change.verdict]
    lines = [str(change) for change in differing]
    for which, one, other in (("before", before, after), ("now", after, before)):
        alone = [f"{group}: {name}" for group, name in ratios(one) if (group, name) not in ratios(other)]
        more = f" and {len(alone) - FEW} more" if len(alone) > FEW else ""
        lines += [f"only {which}: {', '.join(alone[:FEW])}{more}"] if alone else []
    if (a := before["machine"]["device"]) != (b := after["machine"]["device"]):
        lines.append(f"two machines, {a} and {b}: ratios differ between machines too")
    lines.append(f"{len(differing)} of {len(changes)} rows differ; baselines are compared with nothing")
    return lines, bool(differing)


def read(path: Path) -> dict[str, Any]:
    """A result. Raises ValueError: the file is not there, or is none."""
    try:
        result = json.loads(path.read_text())
        assert result["suite"] in SUITES
        ratios(result)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ValueError(f"{path} is no result of the suite (--record or --json FILE write one)") from None
    return dict(result)


def printed(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a recorded result, or what --json wrote")
    parser.add_argument("after", type=Path)
    a = parser.parse_args()
    try:
        lines, differ = report(read(a.before), read(a.after))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print("\n".join(lines))
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
