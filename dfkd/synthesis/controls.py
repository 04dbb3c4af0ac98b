"""Controls: images that guided ones must beat, so that what a student learned can be put down to guided diffusion.

`unguided` and `noise` are weak: they say that labels alone teach nothing. The strong ones, `unguided-pixels` and
`deepinversion`, use the same teacher's gradient without guiding the diffusion, for about the seconds of the guided
images: their steps are counted out from the time that few of them take here.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfkd.config import GenerateCommand
from dfkd.data import read_manifest
from dfkd.files import read_object, replace_text
from dfkd.synthesis import command

STEPS = "equal-seconds.json"  # in the control's folder: its steps, once they are counted out
OUTWEIGHS = 3  # times as long as a trial of one step is the one that tells what a step takes
_SHAPE = {"steps": int, "guided_seconds": float}


@dataclass(frozen=True)
class Control:
    """settings: what differs from [generate]. stepped: the settings for so many steps, None without equal seconds."""

    settings: Mapping[str, Any]
    stepped: Callable[[int, GenerateCommand], Mapping[str, Any]] | None = None


def _deepinversion(steps: int, asked: GenerateCommand) -> Mapping[str, Any]:
    without = "" if asked.generate.guidance.bn_weight else ", bn_weight=0"  # a teacher without BatchNorm
    return {"method": f"deepinversion(steps={steps}{without})"}


CONTROLS: Mapping[str, Control] = {
    "unguided": Control({"method": "guided", "guidance-step": 0.0, "noise-edit-steps": 0}),
    "unguided-pixels": Control(
        {"method": "guided", "guide-from": 1.0, "guide-to": 1.0, "noise-edit-steps": 0, "refine-steps": 1},
        lambda steps, asked: {"refine_steps": steps},
    ),
    "deepinversion": Control({"method": "deepinversion"}, _deepinversion),
    "noise": Control({"method": "noise"}),
}


def images_seconds(folder: Path) -> float:
    """Seconds that the shards of a folder took to make."""
    return sum(float(shard["seconds"]) for shard in read_manifest(folder)[1])


def at_equal_seconds(asked: GenerateCommand, control: Control, guided: Path) -> GenerateCommand:
    """The control with as many steps as take about the seconds of the images in `guided`; itself where it has none.

    The steps are measured once, on one call of images, and kept in STEPS beside its images.
    """
    if control.stepped is None:
        return asked
    kept = asked.out.parent / STEPS
    if not kept.exists():
        seconds = images_seconds(guided)
        steps = _steps_for(seconds, asked, control.stepped)
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_text(kept, json.dumps({"steps": steps, "guided_seconds": round(seconds, 3)}) + "\n")
    found = read_object(kept, _SHAPE, "delete it, and the images beside it", needed=_SHAPE)
    return asked.replace(**control.stepped(found["steps"], asked))


def _steps_for(
    seconds: float, asked: GenerateCommand, stepped: Callable[[int, GenerateCommand], Mapping[str, Any]]
) -> int:
    """Steps that make asked.count images in about so many seconds, by trials on one call of images.

    The longest trial has steps enough to outweigh what else it does, so that a busy moment cannot stand for a step.
    """
    batching = asked.generate.batching
    images = min(asked.count, max(batching.batch // batching.group, 1) * batching.group)

    def trial(steps: int) -> float:
        with tempfile.TemporaryDirectory(prefix="dfkd-") as folder:
            changes = {**stepped(steps, asked), "out": Path(folder), "count": images, "shard_size": 0}
            command.run(asked.replace(**changes), lambda line: None)
            return images_seconds(Path(folder)) * asked.count / images

    base, steps = min(trial(1), trial(1)), 4  # the first one warms up
    while (spent := trial(steps)) < min(OUTWEIGHS * base, seconds):
        steps *= 4
    each = (spent - base) / (steps - 1)
    return max(round(1 + (seconds - base) / each), 1) if each > 0 else 1
