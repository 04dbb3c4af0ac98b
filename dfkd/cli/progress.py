"""Progress for people on stderr: on a terminal a bar with rate and time left, elsewhere a line every half minute."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, TextIO

EVERY = 30.0  # seconds between two lines
FORMAT = "{desc}: {percentage:.1f}%|{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
TAIL = 16_000  # bytes of a log that are looked at
HIDDEN = {"step", "lr"}  # of a log's numbers

Draw = Callable[[float, float], None]


@contextmanager
def progress(
    title: str,
    unit: str,
    shown: bool = True,
    log: Path | None = None,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Draw]:
    """A callable (done, total), as the library's functions take it, that shows both on `stream`, which is stderr.

    unit: singular, shown with the rate, which is of what was done since the first call, or since `done` last fell, as
    it does where another stage begins. log: a log.jsonl, whose last
    numbers stand beside. clock: seconds.
    """
    stream = stream or sys.stderr
    if not shown:
        yield lambda done, total: None
    elif stream.isatty():
        with _bar(title, unit, log, stream) as draw:
            yield draw
    else:
        yield _lines(title, unit, log, stream, clock)


def _lines(title: str, unit: str, log: Path | None, stream: TextIO, clock: Callable[[], float]) -> Draw:
    """Draws a line where EVERY seconds have passed since the last one."""
    first: tuple[float, float] | None = None  # when, and what was done by then
    last = before = 0.0

    def draw(done: float, total: float) -> None:
        nonlocal first, last, before
        now = clock()
        if first is None or done < before:
            first, last = (now, done), now
        before = done
        if now - last < EVERY or done >= total:
            return
        last, rate = now, (done - first[1]) / (now - first[0])
        facts = [f"{done:.0f} of {total:.0f} {unit}"]
        facts += [f"{rate:.3g} {unit}/s, {duration((total - done) / rate)} left"] if rate > 0 else []
        facts += [f"{name} {value:.3g}" for name, value in told(log).items()]
        print(f"{title}: {', '.join(facts)}", file=stream, flush=True)

    return draw


@contextmanager
def _bar(title: str, unit: str, log: Path | None, stream: TextIO) -> Iterator[Draw]:
    """Draws a bar that begins at the first `done`, so that a resumed run shows its own rate."""
    from tqdm import tqdm

    bar: Any = None
    width, height = get_terminal_size()  # 80 x 24 of a terminal that tells none, where tqdm would draw nothing

    def draw(done: float, total: float) -> None:
        nonlocal bar
        if bar is not None and done < bar.n:
            bar.close()
            bar = None
        if bar is None:
            bar = tqdm(
                desc=title,
                unit=unit,
                total=total,
                initial=done,
                file=stream,
                ncols=width,
                nrows=height,
                bar_format=FORMAT,
            )
        bar.total = total
        if bar.update(done - bar.n):  # it was drawn
            bar.set_postfix({name: f"{value:.3g}" for name, value in told(log).items()}, refresh=False)

    try:
        yield draw
    finally:
        if bar is not None:
            bar.close()


def told(log: Path | None) -> dict[str, float]:
    """The last number of each kind in a log.jsonl; {} where there is none."""
    numbers: dict[str, float] = {}
    if log is None or not log.exists():
        return numbers
    with open(log, "rb") as file:
        file.seek(max(log.stat().st_size - TAIL, 0))
        for line in file.read().splitlines():
            with suppress(ValueError):  # of a line that is cut
                numbers |= {name: value for name, value in json.loads(line).items() if name not in HIDDEN}
    return numbers


def duration(seconds: float) -> str:
    """In words: 34 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def say(text: str) -> None:
    """One line for people on stderr, so that stdout keeps its line of JSON."""
    print(text, file=sys.stderr)
