"""log.jsonl: what a run measured on its way, one JSON object per line."""

import json
from pathlib import Path
from typing import Any


class Log:
    """Appends lines that begin with a counter; a resumed run first drops those of what it will repeat.

    counter: the name of its field ("step", "number"); done: its value where the run goes on, 0 for a new one.
    """

    def __init__(self, path: Path, counter: str, done: int) -> None:
        kept = [line for line in _lines(path) if line[counter] <= done] if done else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._path, self._counter = path, counter

    def write(self, count: int, **measured: Any) -> None:
        """Append the count and what was measured there, in JSON's types."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({self._counter: count, **measured}) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break  # the line that was being written when the run was killed
    return lines
