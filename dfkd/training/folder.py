"""The folder of a training: whose run it holds, its checkpoint.pt, and the result.json of a finished one.

A run's identity is plain JSON values by field: everything that its result depends on, and not how it is computed.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from dfkd.errors import UsageError
from dfkd.files import folder_lock, make_writable, remove_partials, replace_file, replace_text
from dfkd.logs import LOG
from dfkd.training.world import World

CHECKPOINT = "checkpoint.pt"
RESULT = "result.json"
WEIGHTS = "model.safetensors"


@contextmanager
def run_folder(
    out: Path, results: Sequence[str], resume: bool, world: World, on_new: Callable[[], object] | None = None
) -> Iterator[None]:
    """Hold `out` for one run: created, locked against others, and emptied of a former run unless `resume`.

    results: the files and folders that a run leaves beside checkpoint, log and result.json. on_new: called by the first
    process once the folder is held, unless a run was begun in it: it may write there, such as the run's settings.
    Raises UsageError where the folder cannot be written or is in use.
    """
    with ExitStack() as held:

        def take() -> None:
            make_writable(out)
            held.enter_context(folder_lock(out))
            remove_partials(out)
            if not resume:
                _clear(out, results)
            if on_new is not None and not holds_run(out):
                on_new()

        world.from_first(take)
        yield


def _clear(out: Path, results: Sequence[str]) -> None:
    # The result goes first: without it nothing that is left passes for a finished run.
    for name in (RESULT, CHECKPOINT, LOG, "tensorboard", *results):
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_checkpoint(out: Path, identity: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Replace out/checkpoint.pt; `content` is of tensors, numbers, texts and containers of these."""
    replace_file(out / CHECKPOINT, lambda file: torch.save({**content, "identity": dict(identity)}, file))


def holds_run(out: Path) -> bool:
    """Whether a run was begun here."""
    return (out / CHECKPOINT).exists() or (out / RESULT).exists()


def read_checkpoint(out: Path, identity: Mapping[str, Any], ignoring: Collection[str] = ()) -> Mapping[str, Any] | None:
    """What was written, tensors on the CPU; None where there is none.

    Raises UsageError where it is damaged, or belongs to a run of another identity but for the fields `ignoring`.
    """
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = content["identity"]
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        why = f"it is not the checkpoint of a training, tensors only ({type(error).__name__})"
        raise UsageError(f"{path} is damaged", why, "start over with --no-resume") from None
    refuse_other(out, found, identity, ignoring)
    return content


def write_result(out: Path, identity: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Replace out/result.json by `result`, plain JSON values, and the identity as `run`; returns what it holds.

    The run is finished with that, and its checkpoint removed.
    """
    content = {**result, "run": dict(identity)}
    replace_text(out / RESULT, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")
    (out / CHECKPOINT).unlink(missing_ok=True)
    return content


def read_result(out: Path) -> dict[str, Any] | None:
    """The result of the run that was finished here, its identity as `run`; None where there is none.

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


def finished(out: Path, weights: Path, identity: Mapping[str, Any], ignoring: Collection[str] = ()) -> bool:
    """Whether a run of this identity is finished here: its result and its weights are there.

    Raises UsageError where the folder holds a run of another identity, finished or not, but for the fields `ignoring`.
    """
    if (result := read_result(out)) is None:
        read_checkpoint(out, identity, ignoring)
        return False
    refuse_other(out, result["run"], identity, ignoring)
    if weights.exists():
        (out / CHECKPOINT).unlink(missing_ok=True)  # of a run that was killed between its last two acts
    return weights.exists()


def refuse_other(
    out: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], ignoring: Collection[str] = ()
) -> None:
    """Raise UsageError, naming each field that differs with both values, unless the two identities are equal."""
    differing = [
        f"{key.replace('_', '-')} is {found.get(key)} there and {wanted.get(key)} here"
        for key in sorted((found.keys() | wanted.keys()) - set(ignoring))
        if found.get(key) != wanted.get(key)
    ]
    if differing:
        todo = "repeat those settings, choose another --out, or start over with --no-resume"
        raise UsageError(f"{out} holds a run of other settings", "; ".join(differing), todo)
