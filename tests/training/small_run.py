"""A teacher, images and a student small enough to train in a fraction of a second."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dfkd.config import DistillConfig, TeacherTrainConfig
from dfkd.data import Pool
from dfkd.teachers import Classifier
from dfkd.training.distill import distill
from dfkd.training.teacher import train_teacher
from dfkd.training.world import World

ALONE = World(torch.device("cpu"))
CLASS_NAMES = ("zero", "one", "two")


class Killed(BaseException):
    """Ends a run at a moment of a test's choice."""


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


class Spare(nn.Module):
    """A network with a head that its answer leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare = network(0), nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.body(images)
        return answers


def teacher() -> Classifier:
    return Classifier(network(1, 8).eval(), CLASS_NAMES, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 8, "tiny")


def pool(count: int = 40, seed: int = 2) -> Pool:
    """Noise of 8x8 pixels, lighter by label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 180, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Pool(images + (labels * 30).to(torch.uint8).view(-1, 1, 1, 1), labels, torch.arange(count), CLASS_NAMES)


def splits(count: int = 40) -> dict[str, Pool]:
    return {"train": pool(count), "validation": pool(12, 3), "test": pool(15, 4)}


SMALL = {"batch_size": 8, "lr": 0.05, "augment": "shift", "device": "cpu"}


def settings(**changes: Any) -> DistillConfig:
    """Settings of a distillation of 12 steps."""
    given = {**SMALL, "student": "tiny", "temperature": 4.0, "held_out": 0.1, "schedule": "multistep"}
    return DistillConfig.of(**given, steps=12).replace(**changes)


def teacher_settings(**changes: Any) -> TeacherTrainConfig:
    """Settings of a teacher's training of 12 steps."""
    return TeacherTrainConfig.of(**SMALL, steps=12).replace(**changes)


def run(out: Path, config: DistillConfig | None = None, **given: Any) -> dict[str, Any]:
    """The result of a distillation, in the first process; by default a tiny student learns the images of `pool`."""
    made = {"data": pool, "teacher": teacher, "student": partial(network, 0)}
    given |= {name: make() for name, make in made.items() if name not in given}  # which seeds torch's generator
    distill(config=config or settings(), out=out, **given)
    return result(out) if given.get("world", ALONE).first else {}


def run_teacher(out: Path, config: TeacherTrainConfig | None = None, **given: Any) -> dict[str, Any]:
    """The result of a teacher's training, in the first process, by default of a resnet8 on the images of `splits`."""
    given = {"data": splits(), "architecture": "resnet8", **given}
    train_teacher(config=config or teacher_settings(), out=out, **given)
    return result(out) if given.get("world", ALONE).first else {}


def result(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found


def at_step(step: int, act: Callable[[], object]) -> Callable[[int, int], None]:
    """A progress of a run, which acts once so many steps were done in it."""
    calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == step + 1:  # the first call comes before the first step
            act()

    return progress


def dies(step: int) -> Callable[[int, int], None]:
    def die() -> None:
        raise Killed

    return at_step(step, die)


def signals(number: int, step: int) -> Callable[[int, int], None]:
    """The process signals itself, so that no test depends on when a signal comes."""
    return at_step(step, lambda: os.kill(os.getpid(), number))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, bit for bit."""
    return _equal(weights(one), weights(other))


def equal_states(one: Classifier, other: Classifier) -> bool:
    return _equal(one.state_dict(), other.state_dict())


def _equal(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def close(one: Path, other: Path, tolerance: float) -> None:
    """Assert that two folders hold the same weights but for rounding."""
    mine, theirs = weights(one), weights(other)
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=tolerance, atol=tolerance / 10)


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
