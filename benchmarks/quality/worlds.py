"""What a scenario's teacher was trained on, the teacher itself, and what its prior was trained on."""

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import prior_world
from benchmarks.quality import cifar10
from benchmarks.quality.scenario import Scenario
from dfkd.data import Images, Pool
from dfkd.evaluation import open_images
from dfkd.evaluation.sources import DIGITS
from dfkd.runtime import derived_seed
from dfkd.teachers.sources import EMBEDDED
from dfkd.training.teacher import train_teacher

SHIFTS = {"demo": ("none",), "cifar10": tuple(cifar10.SHIFTS)}


@dataclass(frozen=True)
class World:
    """data, prior: the real images of the teacher's world and of the prior's, by name; "" for world Y, which is made
    when it is asked for. teacher: its folder."""

    data: str
    teacher: Path
    prior: str

    def real(self, size: int) -> Images:
        """What the teacher was trained on."""
        return open_images(self.data, "train", size)

    def prior_data(self, count: int, seed: int) -> Images:
        """What the prior was trained on, as many images as are there; so many of world Y."""
        return open_images(self.prior, "train", cifar10.SIZE) if self.prior else _digits(count, seed)


def prepare(scenario: Scenario, data: str | None, seed: int, out: Path) -> World:
    """The world of a seed, its images written and its teacher trained unless they are there.

    data: the user's CIFAR-10, by name. The demo has a teacher a seed; that of cifar10 without a shift comes with the
    program, and one of shifted images is trained, once. Raises UsageError: no such data.
    """
    if scenario.teacher_a_seed:
        return World(DIGITS, _taught(scenario, DIGITS, seed, out / f"seed-{seed}" / "teacher"), "")
    assert data is not None
    cifar10.write(data, scenario.shift, out / "world")
    theirs, others = (f"cifar:{out / 'world' / name}" for name in ("teacher", "prior"))
    known = scenario.shift == "none" and not scenario.rehearsed
    teacher = EMBEDDED["cifar10-mini"] if known else _taught(scenario, theirs, 0, out / "teacher")
    return World(theirs, teacher, others)


def _taught(scenario: Scenario, data: str, seed: int, out: Path) -> Path:
    asked = scenario.teaching(data, seed, out)
    train_teacher(asked.data, asked.training, asked.out, architecture=asked.architecture)
    return out


def _digits(count: int, seed: int) -> Pool:
    """Images of world Y, the classes in turn."""
    labels = torch.arange(count) % len(prior_world.CLASS_NAMES)
    images, labels = prior_world.prior_images(count, derived_seed(seed, "world", 0), labels)
    return Pool(images, labels, torch.arange(count), prior_world.CLASS_NAMES)


def pretended(out: Path) -> str:
    """Noise in the form of CIFAR-10, for a rehearsal; returns its name as a source of real images."""
    noise = torch.Generator().manual_seed(0)
    for file, count in (("data_batch_1.bin", 200), ("test_batch.bin", 50)):
        labels = torch.arange(count) // 2 % 10
        images = torch.randint(256, (count, 3, cifar10.SIZE, cifar10.SIZE), generator=noise).to(torch.uint8)
        out.mkdir(parents=True, exist_ok=True)
        cifar10.write_batch(out / file, images, labels)
    return f"cifar:{out}"
