"""The demo's networks for what is timed: the embedded prior, and a teacher of the demo's kind with random weights.

Arithmetic does not look at weights, and so no teacher has to be trained before anything can be timed.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch

import dfkd.priors  # noqa: F401  (makes the embedded prior known by its name)
from benchmarks.prior_world import CLASS_NAMES, SIZE
from dfkd import teachers
from dfkd.config import GenerateConfig, TrainTeacherCommand, read_preset, section
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd.teachers import Classifier
from dfkd_engine.priors.prior import Prior

ARCHITECTURE = str(section(read_preset("demo"), TrainTeacherCommand.SECTION)["architecture"])


@cache
def teacher(folder: Path | None = None) -> Classifier:
    """A folder's of dfkd-train-teacher, or one with random weights."""
    if folder is not None:
        return Classifier.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = teachers.build(ARCHITECTURE, len(CLASS_NAMES))
    return Classifier(module, CLASS_NAMES, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), SIZE, ARCHITECTURE)


def settings(images: int, device: torch.device, **changes: Any) -> GenerateConfig:
    """The preset's, with groups and calls of so many images, and without engines."""
    own = {"group": images, "batch": images, "shard_size": 0, "device": str(device), "backend": "eager"}
    return GenerateConfig.preset("demo", **{**own, **changes})


def pipeline(images: int, device: torch.device, trained: Path | None = None, **changes: Any) -> GuidedPipeline:
    """A pipeline on networks of its own; `changes` by flat name."""
    config = settings(images, device, **changes)
    prior = Prior.from_pretrained("demo", dtype=config.compute.dtype)
    return GuidedPipeline(prior, teacher(trained), config)
