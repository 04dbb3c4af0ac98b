"""A method's images, group by group, until a budget of seconds is spent.

A second of budget is a second of two CPU cores: two core seconds of a process with one thread, so that what runs beside
it counts as little as possible. The clock starts when the networks are open, and the images are on disk when it stops.
They lie in shards as those of dfkd-generate, a group each, and SPENT beside them says what had been spent at the end of
each: the images of a smaller budget are the first ones. Stopped and started again a set goes on.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.flops import counted
from dfkd.config import GenerateCommand
from dfkd.synthesis.command import pipeline_of
from dfkd.synthesis.run import open_run
from dfkd.synthesis.synthesizer import Synthesizer

CORES = 2  # of a second of budget
FLOP_IMAGES = 20  # of the group whose arithmetic is counted
SPENT = "spent.jsonl"

Spent = list[tuple[int, float]]  # images, and the seconds until they were on disk, group by group


def make(asked: GenerateCommand, seconds: float, most: int) -> Spent:
    """Make images until `seconds` of budget are spent, or `most` are there; returns what was spent.

    Raises UsageError: the folder holds images of other settings or networks.
    """
    spent, synthesizer = read_spent(asked.out), pipeline_of(asked)
    group = _together(synthesizer, asked)
    count = max(min(most, getattr(synthesizer, "available", most)) // group, 1) * group
    with open_run(synthesizer, asked.out, count, asked.seed, asked.generate, part=group) as run:
        for first in range(0, count, group):
            if spent and spent[-1][1] >= seconds:
                break
            begun = time.process_time()
            written = run.write(part=range(first, first + group))
            taken = (time.process_time() - begun) / CORES
            if first < len(spent) * group:
                continue
            if not written.images and spent:  # made by a run that was stopped before it could say so
                taken = spent[-1][1] / len(spent)
            spent.append((first + group, round((spent[-1][1] if spent else 0.0) + taken, 4)))
            _write_spent(asked.out, spent)
    return spent


def of_budget(spent: Spent, seconds: float) -> tuple[int, float]:
    """Images that a budget allows, whole groups, and the seconds that they took. Raises ValueError: not one group."""
    whole = [pair for pair in spent if pair[1] <= seconds]
    if not whole:
        raise ValueError(f"a group of {spent[0][0]} images takes {spent[0][1]:.1f} s of a budget of {seconds:g} s")
    return whole[-1]


def read_spent(folder: Path) -> Spent:
    """What was spent on a set, so far as it is made."""
    file = folder / SPENT
    return [tuple(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []  # type: ignore[misc]


def _write_spent(folder: Path, spent: Sequence[tuple[int, float]]) -> None:
    with open(folder / SPENT, "a", encoding="utf-8") as file:
        file.write(json.dumps(spent[-1]) + "\n")


def _together(synthesizer: Synthesizer, asked: GenerateCommand) -> int:
    """Images of a shard: a group, or a call of a method whose images do not interact."""
    return synthesizer.group if synthesizer.group > 1 else asked.generate.batching.batch


def flop_of(asked: GenerateCommand) -> float:
    """FLOP of an image, counted operation by operation over a small group."""
    few = asked.replace(group=FLOP_IMAGES, batch=FLOP_IMAGES)
    synthesizer = pipeline_of(few)
    images = range(_together(synthesizer, few))
    _, flop = counted(lambda: synthesizer(images, seed=0))
    return flop / len(images)
