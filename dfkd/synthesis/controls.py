"""Controls: images that guided ones must beat, so that what a student learned can be put down to guided diffusion.

`unguided` and `noise` are weak: they say that labels alone teach nothing. The strong ones, `unguided-pixels` and
`deepinversion`, use the same teacher's gradient without guiding the diffusion, for about the seconds of the guided
images: their steps are counted out from what few of them, and a call of guided images, take here.
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


@dataclass(frozen=True)
class Control:
    """settings: what differs from [generate]. stepped: the settings for so many steps, None without equal seconds."""

    settings: Mapping[str, Any]
    stepped: Callable[[int, GenerateCommand], Mapping[str, Any]] | None = None


def _deepinversion(steps: int, asked: GenerateCommand) -> Mapping[str, Any]:
    without = "" if asked.generate.guidance.bn_weight else ", bn_weight=0"  # a teacher without BatchNorm
    return {"method": f"deepinversion(steps={steps}{without})"}


# What a trial goes without: it is for the seconds of a call.
_TRIAL = {
    "shard_size": 0,
    "format": "webdataset",
    "step_trials": 0,
    "class_words": 0,
    "filter_views": 0,
    "filter_agreement": 0.5,
}
# Noise as it is: a teacher that reads it all as one class would leave none of the others.
_UNCHOSEN = {"candidates": 1, "keep": "medium", "keep-weight": 1.0, "filter-views": 0, "filter-agreement": 0.5}
# Of methods that do not denoise step by step: what [generate] asks of the steps.
_WITHOUT_STEPS = {"keep-intermediates": 0}

CONTROLS: Mapping[str, Control] = {
    "unguided": Control({"method": "guided", "guidance-step": 0.0, "noise-edit-steps": 0, "class-words": 0}),
    "unguided-pixels": Control(
        {"method": "guided", "guide-from": 1.0, "guide-to": 1.0, "noise-edit-steps": 0, "refine-steps": 1},
        lambda steps, asked: {"refine_steps": steps},
    ),
    "deepinversion": Control({"method": "deepinversion", **_WITHOUT_STEPS}, _deepinversion),
    "noise": Control({"method": "noise", **_WITHOUT_STEPS, **_UNCHOSEN}),
}


def at_equal_seconds(asked: GenerateCommand, control: Control, guided: GenerateCommand) -> GenerateCommand:
    """The control with as many steps as take about the seconds of the guided images; itself where it has none.

    Both are timed here and now, on one call of images each: seconds on record may be those of a machine that was
    busier, or less. The steps are counted once, and kept in STEPS beside the control's images.
    """
    if control.stepped is None:
        return asked
    kept = asked.out.parent / STEPS
    if not kept.exists():
        steps, wanted, taken = _steps_for(guided, asked, control.stepped)
        kept.parent.mkdir(parents=True, exist_ok=True)
        found = {"steps": steps, "guided_seconds_a_call": round(wanted, 3), "seconds_a_call": round(taken, 3)}
        replace_text(kept, json.dumps(found) + "\n")
    steps = read_object(kept, {"steps": int}, "delete it, and the images beside it", needed=("steps",))["steps"]
    return asked.replace(**control.stepped(steps, asked))


def _steps_for(
    guided: GenerateCommand,
    asked: GenerateCommand,
    stepped: Callable[[int, GenerateCommand], Mapping[str, Any]],
) -> tuple[int, float, float]:
    """Steps that take a call's time of guided images; that time, and what these steps should take.

    The longest trial has steps enough to outweigh what else it does, so that a busy moment cannot stand for a step.
    """

    def timed(steps: int) -> float:
        return trial(asked.replace(**stepped(steps, asked)))

    base, wanted, steps = min(timed(1), timed(1)), trial(guided), 4  # the first one warms up
    while (spent := timed(steps)) < min(OUTWEIGHS * base, wanted):
        steps *= 4
    each = (spent - base) / (steps - 1)
    found = max(round(1 + (wanted - base) / each), 1) if each > 0 else 1
    return found, wanted, base + each * (found - 1)


def trial(asked: GenerateCommand) -> float:
    """Seconds of as many images as a call holds, which are thrown away; where several come of one trajectory, they
    share its seconds."""
    batching, snapshots = asked.generate.batching, 1 + asked.generate.sampling.keep_intermediates
    images = min(asked.count, max(batching.batch // batching.group, 1) * batching.group) * snapshots
    with tempfile.TemporaryDirectory(prefix="dfkd-") as folder:
        out = Path(folder)
        command.run(asked.replace(out=out, count=images, **_TRIAL), lambda line: None)
        return sum(float(shard["seconds"]) for shard in read_manifest(out)[1]) / snapshots
