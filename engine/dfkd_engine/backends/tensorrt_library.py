"""What building a TensorRT plan and running it share: the library's one log, and the profiles of a plan."""

from functools import cache
from typing import Any

Profile = tuple[int, int, int]


def profiles(batch: tuple[int, int, int]) -> tuple[Profile, ...]:
    """(smallest, best, largest) rows of the profiles for a spec's batch: the planned rows alone, then all others.

    A call of one row is computed as two (engine/compiled.py). Half of the planned rows is what the others are best at:
    a step without classifier-free guidance, or a call that was halved for want of memory.
    """
    planned = max(batch[1], 2)
    largest = max(batch[2], planned)
    others = largest if largest > planned else planned - 1
    fixed = (planned, planned, planned)
    return (fixed,) if others < 2 else (fixed, (2, max(2, planned // 2), others))


@cache
def library_log(trt: Any) -> Any:
    """The one logger that all builders and runtimes of a process share: it keeps errors and passes nothing on."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

        def clear(self) -> None:
            self.errors.clear()

        def said(self) -> str:
            """The last error, "" where there was none."""
            return self.errors[-1] if self.errors else ""

        def blamed(self, nodes: dict[str, Any]) -> tuple[str, str, str]:
            """(node, "", message) of the first error that names a node, or ("", "", what was said last)."""
            for message in self.errors:
                named = [name for name in nodes if name and name in message.replace("'", " ").split()]
                if named:
                    return max(named, key=len), "", message
            return "", "", self.said() or "it gave no reason"

    return Log()
