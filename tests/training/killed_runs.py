"""Runs killed by SIGKILL at random steps and started again, beside runs that were not: python -m ... OUT SEED.

Each run is a fork of this process, which has computed nothing: a fresh one without the seconds of its imports.
"""

import os
import random
import signal
import sys
import traceback
from pathlib import Path

import torch

from dfkd.training.train import distill
from tests.training.small_run import network, pool, settings, teacher

# Everything that a resumed run has to get right: views, averages, mixtures, labels, precision, dropout, BatchNorm.
RUNS: dict[str, dict[str, object]] = {
    "labels": {"augment": "affine-colour", "ema": 0.9, "ce_weight": 0.5, "clip_norm": 1.0, "checkpoint_every": 3},
    "mixtures": {"augment": "rrc-flip", "ema": 0.9, "mix": "mixup", "amp": "bf16", "warmup": 4, "epochs": 3},
    "cached": {"augment": "none", "schedule": "cosine", "ce_weight": 1.0, "checkpoint_every": 2},
}


def life(out: Path, options: dict[str, object], dies_after: int | None) -> int:
    """The exit status of one process of the run, which dies after so many steps of its own."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    steps = 0

    def watch(done: int, total: int) -> None:
        nonlocal steps
        if steps == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1

    try:
        torch.set_num_threads(1)
        distill(pool(), teacher(), network(0), settings(**options), out, architecture="tiny", watch=watch)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(out: Path, seed: int) -> None:
    chance = random.Random(seed)
    for name, options in RUNS.items():
        assert life(out / name / "whole", options, None) == 0
        for moment in [chance.randrange(12) for _ in range(2)]:
            status = life(out / name / "killed", options, moment)
            print(name, moment, status)  # a run that is shorter than its moment by now ends well
            assert status in (0, signal.SIGKILL)
        assert life(out / name / "killed", options, None) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
