"""A teacher, a pool and a student small enough to distil in a second."""

import os
from collections.abc import Callable

import torch
from torch import nn

from dfkd.training.settings import DistillSettings
from dfkd.data.shards import Pool
from dfkd.teachers.classifier import Classifier

CLASS_NAMES = ("zero", "one", "two")


def network(seed: int, width: int = 4, classes: int = 3) -> nn.Module:
    """With BatchNorm and dropout, whose state and randomness a resumed run must get right."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


def teacher() -> Classifier:
    return Classifier(network(1, 8).eval(), "tiny", CLASS_NAMES, 8, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def pool(count: int = 40) -> Pool:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Pool(images, torch.arange(count) % 3, torch.arange(count), CLASS_NAMES)


def settings(**changes: object) -> DistillSettings:
    given = {"batch_size": 8, "lr": 0.05, "temperature": 4.0, "augment": "shift", "held_out": 0.1, "device": "cpu"}
    length = {} if "epochs" in changes else {"steps": 12}
    return DistillSettings(**{**given, **length, **changes})


def sending(number: int, step: int) -> Callable[[int, int], None]:
    """A watch for a run that sends its own process a signal after so many steps."""
    calls = 0

    def watch(done: int, total: int) -> None:
        nonlocal calls
        if calls == step:
            os.kill(os.getpid(), number)
        calls += 1

    return watch
