"""A run that goes on where it was stopped: its checkpoint.pt, its result.json, and whose run a folder holds.

A run's identity is plain JSON values by field: everything that what it makes depends on, and not how it is computed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dfkd.errors import UsageError
from dfkd.files import replace_file, replace_text

CHECKPOINT = "checkpoint.pt"
RESULT = "result.json"


def write_checkpoint(out: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Replace out/checkpoint.pt; ``state`` is of tensors, numbers, texts and containers of these."""
    content = {**state, "identity": dict(identity)}
    replace_file(out / CHECKPOINT, lambda file: torch.save(content, file))


def read_checkpoint(out: Path, identity: Mapping[str, Any], device: torch.device) -> Mapping[str, Any] | None:
    """The state that was written, its tensors on ``device``; None where there is none yet.

    Raises UsageError where it belongs to a run of another identity (naming each field with both values) or is damaged.
    """
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        found = content["identity"]
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        why = f"{type(error).__name__} {error}".splitlines()[0]
        raise UsageError(f"{path} is damaged", why, "start over with --no-resume") from None
    refuse_other(out, found, identity)
    return content


def write_result(out: Path, identity: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Replace out/result.json; returns what it holds: ``result``, plain JSON values, and the identity as ``run``."""
    content = {**result, "run": dict(identity)}
    replace_text(out / RESULT, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return content


def read_result(out: Path) -> dict[str, Any] | None:
    """The result of the run that was finished here, its identity as ``run``; None where there is none.

    Raises UsageError for a file that is not such a result.
    """
    path = out / RESULT
    if not path.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        dict(result["run"])
    except (ValueError, KeyError, TypeError):
        why, todo = "no settings of its run are in it", "choose another --out, or start over with --no-resume"
        raise UsageError(f"{path} was not written by this version", why, todo) from None
    return result


def refuse_other(out: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UsageError, naming each field that differs with both values, unless the two identities are equal."""
    differing = [
        f"{key.replace('_', '-')} is {found.get(key)} there and {wanted.get(key)} here"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if differing:
        todo = "repeat those settings, choose another --out, or start over with --no-resume"
        raise UsageError(f"{out} holds a run of other settings", "; ".join(differing), todo)
