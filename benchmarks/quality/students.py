"""A student of a set of images, judged on real ones."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dfkd.config import DistillCommand
from dfkd.data import Images, Pool
from dfkd.evaluation import evaluate
from dfkd.files import replace_text
from dfkd.runtime import generator
from dfkd.teachers import load_teacher
from dfkd.training.distill import distill

JUDGED = "judged.json"


def judge(asked: DistillCommand, images: Images, data: str, split: str, limit: int | None = None) -> Mapping[str, Any]:
    """Train the student that the settings describe, and test it: {"accuracy", "core_seconds"}.

    It is kept in the student's folder, and found there the next time. data, split: of the real images, of which `limit`
    at most are asked.
    """
    kept = asked.out / JUDGED
    if not kept.exists():
        begun, teacher = time.process_time(), load_teacher(asked.teacher)
        student = distill(images, teacher, asked.distill, asked.out)
        spent = time.process_time() - begun
        accuracy = evaluate(student, data, split=split, limit=limit).accuracy
        replace_text(kept, json.dumps({"accuracy": accuracy, "core_seconds": round(spent, 1)}))
    known: dict[str, Any] = json.loads(kept.read_text())
    return known


def some_of(images: Images, count: int, seed: int) -> Pool:
    """So many images, drawn without replacement: all of them where there are no more."""
    rows = torch.randperm(len(images.labels), generator=generator(seed, "real", 0))[:count].sort().values
    return Pool(images.read(rows), images.labels[rows], torch.arange(len(rows)), images.class_names)


def folder_of(out: Path, seed: int, method: str, seconds: float) -> Path:
    """Where the student of a method's images of a budget lies."""
    return out / f"seed-{seed}" / method / f"student-{seconds:g}s"
