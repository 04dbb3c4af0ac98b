"""Progress for people: on a terminal a bar with rate and time left, elsewhere nothing."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(title: str, unit: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A callable (done, total), as the library's functions take it, that draws a bar on stderr.

    unit: singular, shown with the rate. The bar begins at the first `done`, so that a resumed run shows its own rate.
    """
    from tqdm import tqdm

    bar = tqdm(desc=title, unit=unit, file=sys.stderr, disable=not (shown and sys.stderr.isatty()), dynamic_ncols=True)
    began = False

    def draw(done: int, total: int) -> None:
        nonlocal began
        bar.total = total
        if not began:
            began, bar.initial, bar.n = True, done, done
        bar.update(done - bar.n)

    with bar:
        yield draw


def say(text: str) -> None:
    """One line for people on stderr, so that stdout keeps its line of JSON."""
    print(text, file=sys.stderr)
