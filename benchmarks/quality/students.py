"""A student of a set of images, judged on real ones."""

import json

import torch

from dfkd.config import DistillCommand
from dfkd.data import Images, Pool
from dfkd.evaluation import evaluate
from dfkd.files import replace_text
from dfkd.runtime import generator
from dfkd.teachers import load_teacher
from dfkd.training.distill import distill

JUDGED = "judged.json"


def judge(asked: DistillCommand, images: Images, data: str, split: str, limit: int | None = None) -> float:
    """Train the student that the settings describe, and test it: its accuracy.

    It is kept in the student's folder, and found there the next time. data, split: of the real images, of which `limit`
    at most are asked. Raises UsageError: the folder holds a student of other settings, images or teacher.
    """
    kept = asked.out / JUDGED
    student = distill(images, load_teacher(asked.teacher), asked.distill, asked.out)
    if not kept.exists():
        accuracy = evaluate(student, data, split=split, limit=limit).accuracy
        replace_text(kept, json.dumps({"accuracy": accuracy}))
    return float(json.loads(kept.read_text())["accuracy"])


def some_of(images: Images, count: int, seed: int) -> Pool:
    """So many images, drawn without replacement: all of them where there are no more."""
    rows = torch.randperm(len(images.labels), generator=generator(seed, "real", 0))[:count].sort().values
    return Pool(images.read(rows), images.labels[rows], torch.arange(len(rows)), images.class_names)
