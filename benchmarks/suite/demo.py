"""The demo's networks for the suite: the embedded prior, and a teacher of the demo's kind with random weights.

Arithmetic does not look at weights, and so no teacher has to be trained before anything can be timed.
"""

from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.guidance_paths import options_of
from benchmarks.suite.case import Place
from dfkd import teachers
from dfkd.cli.prepare import prepare
from dfkd.compiled.functions import Sources
from dfkd.compiled.sources import sources_of
from dfkd.presets import PRESETS
from dfkd.synthesis.run import Synthesis
from dfkd.synthesis.schedule import StepTable
from dfkd.teachers import Classifier, checkpoint

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 32


def images(place: Place) -> int:
    """Of a group, and of a call of a network."""
    return 16 if place.quick else 64


@cache
def teacher(folder: Path) -> Path:
    """A folder of dfkd-train-teacher."""
    architecture = str(PRESETS["demo"].train_teacher["architecture"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = teachers.build(architecture, len(CLASSES))
    made = Classifier(module, architecture, CLASSES, SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    checkpoint.save(folder / "teacher", made)
    return folder / "teacher"


def synthesis(place: Place, group: int, overrides: dict[str, Any], kernels: str = "torch") -> Synthesis:
    """One with the `demo` preset and these options of dfkd-generate."""
    options = options_of(teacher(place.folder), str(place.device), place.folder, overrides, [])
    return replace(prepare(options, kernels), group=group)


@cache
def sources(folder: Path, device: torch.device) -> Sources:
    """What the demo's engines are made of."""
    return sources_of(prepare(options_of(teacher(folder), str(device), folder, {}, [])))


def one_step(table: StepTable, step: int) -> StepTable:
    """The table of step number `step` alone."""
    columns = {f.name: getattr(table, f.name) for f in fields(table)}
    cut = {name: value[step : step + 1] for name, value in columns.items() if isinstance(value, torch.Tensor)}
    return replace(table, **cut)
