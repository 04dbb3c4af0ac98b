"""Signals that wait for a moment at which a run can stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

DEFERRED = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """SIGTERM and SIGINT only take a note until the end of the block; yields what tells the first one's number, or 0.

    A second SIGINT interrupts as ever (KeyboardInterrupt): who asks twice does not want to wait for a step. Outside the
    main thread, where Python runs no handlers, nothing changes.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {number: signal.signal(number, note) for number in DEFERRED}
    try:
        yield lambda: noted[0] if noted else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
