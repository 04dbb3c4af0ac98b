"""Progress bars for people: on a terminal a bar with rate and time left, elsewhere nothing."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(work: Iterable[Any] | int, desc: str, unit: str, shown: bool = True) -> Any:
    """A bar over an iterable (``for x in progress(xs, ...)``) or up to a total (``with progress(n, ...) as bar:
    bar.update(k)``), on stderr so that stdout keeps its one JSON line. ``unit`` is the singular shown with the rate.
    shown: False shows nothing anywhere."""
    iterable, total = (None, work) if isinstance(work, int) else (work, None)
    return tqdm(
        iterable,
        total=total,
        desc=desc,
        unit=unit,
        file=sys.stderr,
        disable=not (shown and sys.stderr.isatty()),
        dynamic_ncols=True,
    )
