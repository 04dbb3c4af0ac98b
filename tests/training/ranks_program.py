"""What each of two processes under torchrun does in tests/distillation/test_world.py.

torchrun ... ranks_program.py OUT        rank 1 kills itself once; its second life finds what is finished
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from dfkd.cli.distill import COMMAND, Options, run_in
from dfkd.cli.options import command
from dfkd.training.settings import DistillSettings
from dfkd.training.train import distill
from dfkd.training.world import World, join
from dfkd.errors import Stopped, UsageError
from tests.training.small_run import network, pool, sending, settings, teacher

FIRST_LIFE = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"


def plain_network() -> nn.Module:
    """Without BatchNorm and dropout: what it learns does not depend on how a batch is shared out."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers)


def normalised_network() -> nn.Module:
    return nn.Sequential(*(layer for layer in network(0) if not isinstance(layer, nn.Dropout)))  # type: ignore[attr-defined]


# One process or two: the losses of every step are compared. 9 rows are 4 and 5, the last batch of 36 images x 2 has 0.
EQUAL: dict[str, dict[str, object]] = {
    "even": {"augment": "affine", "checkpoint_every": 1, "steps": 12},
    "uneven": {"augment": "crop-flip", "checkpoint_every": 1, "batch_size": 9, "epochs": 1, "held_out": 0.05},
    # Grad-CAMs behind the last ReLU: in front of one a gradient jumps where rounding moves a value across 0.
    "maps": {
        "augment": "shift",
        "checkpoint_every": 1,
        "batch_size": 9,
        "lr": 0.005,
        "steps": 6,
        "msarc_weight": 5.0,
        "msarc_maps": "gradcam",
        "msarc_teacher_stages": ("4",),
        "msarc_student_stages": ("2",),
    },
    "labels": {"augment": "none", "checkpoint_every": 1, "ce_weight": 1.0, "clip_norm": 0.2, "ema": 0.9},
}
NORMALISED: dict[str, object] = {"augment": "shift", "checkpoint_every": 1, "steps": 12, "batch_size": 32}
STOPPED: dict[str, object] = {"augment": "shift", "checkpoint_every": 5}
KILLED: dict[str, object] = {"augment": "affine", "checkpoint_every": 3, "ema": 0.9, "mix": "mixup"}


def train(world: World, out: Path, options: DistillSettings, student: nn.Module, **more: object) -> None:
    distill(pool(), teacher(), student, options, out, architecture="tiny", world=world, **more)  # type: ignore[arg-type]


def main(out: Path, arguments: list[str]) -> None:
    with join("cpu") as world:
        assert command(Options, partial(run_in, world), COMMAND, arguments) == 0
        for name, options in EQUAL.items():
            train(world, out / name, settings(**options), plain_network())
        train(world, out / "normalised", settings(**NORMALISED), normalised_network())
        try:
            train(world, out / "even", settings(**{**EQUAL["even"], "lr": 0.01}), plain_network())
        except UsageError as error:
            (out / f"refused-{world.rank}").write_text(str(error))
        term = sending(signal.SIGTERM, 3) if world.rank and FIRST_LIFE else lambda done, total: None
        train(world, out / "unstopped", settings(**STOPPED), network(0))
        try:
            train(world, out / "stopped", settings(**STOPPED), network(0), watch=term)
        except Stopped as stop:
            (out / f"stopped-{world.rank}").write_text(json.dumps([stop.signum, str(stop)]))
        train(world, out / "stopped", settings(**STOPPED), network(0))
        train(world, out / "whole", settings(**KILLED), network(0))
        kill = sending(signal.SIGKILL, 7) if world.rank and FIRST_LIFE else lambda done, total: None
        train(world, out / "killed", settings(**KILLED), network(0), watch=kill)
    (out / f"lives-{world.rank}").write_text(os.environ["TORCHELASTIC_RESTART_COUNT"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
