"""What is on record of a GPU, and what a new run makes of it.

A section of a record is {"machine", "seconds"} with "result", what it measured, or "why" it measured nothing; with both
it was stopped, and the result has the rows until then. "again" is a later try that the result outlived: {"machine",
"seconds", "why"}. The record's own "machine" is that of the last run.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


class RecordError(ValueError):
    """What lies there is no record that could be kept."""


def read(path: Path, known: Collection[str]) -> dict[str, Any]:
    """By section what is on record, nothing where there is no file. Raises RecordError."""
    if not path.exists():
        return {}
    try:
        sections: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["sections"]
        unknown = [name for name, found in sections.items() if name not in known or "machine" not in found]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RecordError(f"{path} is no record of a gpu-report: move it away") from None
    if unknown:
        raise RecordError(f"{path} has a section {unknown[0]!r} of another version of gpu-report: move it away")
    return sections


def merged(record: Mapping[str, Any], now: Mapping[str, Any], order: Collection[str]) -> dict[str, Any]:
    """The record with what was found now, in `order`: nothing on record gives way to less.

    A whole result gives way to a whole one, that of a stopped section to any; else it stays, the later try noted.
    """
    found = dict(record)
    for name, own in now.items():
        before = record.get(name, {})
        if "result" in before and ("result" not in own or ("why" in own and "why" not in before)):
            found[name] = {**before, "again": {key: own[key] for key in ("machine", "seconds", "why")}}
        else:
            found[name] = own
    return {name: found[name] for name in order if name in found}


def made_with(machine: Mapping[str, Any]) -> str:
    """Versions, commit and date of `benchmarks.machine.describe`."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"{versions}; Python {machine['python']}, commit {machine['commit']}, {machine['date']}"
