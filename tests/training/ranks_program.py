"""What each of two processes under torchrun does in test_world.py: ranks_program.py OUT, and arguments of dfkd-distill.

Rank 1 dies once, in the last run; in its second life it finds what is finished.
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfkd.cli.distill import COMMAND, run_in
from dfkd.cli.parse import command
from dfkd.config import DistillCommand
from dfkd.errors import Stopped, UsageError
from dfkd.training.world import join
from tests.training.small_run import (
    Spare,
    at_step,
    network,
    pool,
    run,
    run_teacher,
    settings,
    signals,
    splits,
    teacher,
    teacher_settings,
)

FIRST_LIFE = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
# One process or two: the losses of every step are compared. 9 rows are 4 and 5.
EQUAL: dict[str, dict[str, Any]] = {
    "uneven": {"batch_size": 9, "checkpoint_every": 1, "ce_weight": 1.0, "clip_norm": 0.2, "ema": 0.9},
    # Grad-CAMs behind the last ReLU: in front of one a gradient jumps where rounding moves a value across 0.
    "maps": {
        "checkpoint_every": 1,
        "batch_size": 9,
        "lr": 0.005,
        "steps": 6,
        "msarc_weight": 5.0,
        "msarc_maps": "gradcam",
        "msarc_teacher_stages": ("4",),
        "msarc_student_stages": ("2",),
    },
}
STOPPED: dict[str, Any] = {"checkpoint_every": 5, "mix": "mixup"}
KILLED: dict[str, Any] = {"checkpoint_every": 3, "ema": 0.9, "augment": "affine"}


def plain_network() -> nn.Module:
    """Without BatchNorm and dropout: what it learns does not depend on how a batch is shared out."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers)


def main(out: Path, arguments: list[str]) -> None:
    with join("cpu") as world:
        first = {"world": world, "data": pool(), "teacher": teacher()}
        assert command(DistillCommand, partial(run_in, world), COMMAND, arguments) == 0
        for name, changes in EQUAL.items():
            run(out / name, settings(**changes), student=plain_network(), **first)
        try:
            run(out / "uneven", settings(**{**EQUAL["uneven"], "lr": 0.01}), student=plain_network(), **first)
        except UsageError as error:
            (out / f"refused-{world.rank}").write_text(str(error))
        run(out / "spare", settings(steps=3), student=Spare(), **first)
        run(out / "unstopped", settings(**STOPPED), student=network(0), **first)
        term = signals(signal.SIGTERM, 3) if world.rank and FIRST_LIFE else None
        try:
            run(out / "stopped", settings(**STOPPED), student=network(0), progress=term, **first)
        except Stopped as stop:
            (out / f"stopped-{world.rank}").write_text(json.dumps([stop.signum, str(stop)]))
        run(out / "stopped", settings(**STOPPED), student=network(0), **first)
        run_teacher(out / "whole", teacher_settings(**KILLED), world=world, data=splits())
        dies = at_step(7, lambda: os._exit(9)) if world.rank and FIRST_LIFE else None
        run_teacher(out / "killed", teacher_settings(**KILLED), world=world, data=splits(), progress=dies)
    (out / f"lives-{world.rank}").write_text(os.environ["TORCHELASTIC_RESTART_COUNT"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
