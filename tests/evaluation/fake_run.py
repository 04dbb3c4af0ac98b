"""A run's folders as the commands leave them, small and without having run them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from dfkd.data import Record, ShardFolder, open_folder
from dfkd.teachers import Classifier, build

CLASS_NAMES = ("zero", "one & <only>", "two")
CONFUSION = [[8, 2, 0], [1, 9, 0], [3, 1, 6]]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_images(path: Path, count: int = 12, size: int = 8, guided: bool = True, **settings: object) -> Path:
    """Noise images with classes in turn; guided ones have loss curves and teacher probabilities."""
    records = []
    for i in range(count):
        curve = {"bn": [3.0, 2.0, 1.5, 1.2], "cls": [2.0, 0.5, 0.1, 0.01 * (i + 1)]} if guided else {}
        probability = (i + 1) / (count + 1) if guided else 0.0
        name = CLASS_NAMES[i % 3]
        records.append(Record(i, i % 3, name, 0, "", loss_curve=curve, teacher_probability=probability))
    images = np.random.default_rng(count).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    with ShardFolder.create_or_open(path, settings, CLASS_NAMES, size, "png", count, count) as folder:
        folder.write(0, images, records, seconds=2.0)
    write_json(path / "settings.json", {"command": "dfkd-generate", "options": {"cfg": 3.0}, "versions": {}})
    return path


def write_teacher(path: Path) -> Classifier:
    torch.manual_seed(0)
    module: nn.Module = build("resnet8", 3)
    teacher = Classifier(module.eval(), CLASS_NAMES, (0.5,) * 3, (0.2,) * 3, 8, "resnet8")
    teacher.save_pretrained(path)
    write_json(path / "result.json", {"accuracy": 0.96, "seconds": 61.0})
    return teacher


def write_student(path: Path, accuracy: float | None, data: str = "") -> None:
    tested = {"accuracy": accuracy, "confusion": CONFUSION, "test": "digits-on-photos", "test_images": 30}
    untested = {"accuracy": None, "confusion": None, "test": None, "test_images": 0}
    result = {"agreement": 0.9, "steps": 100, "seconds": 48.0, "class_names": CLASS_NAMES, "test_split": "test"}
    result |= {"run": {"student": "resnet20", "data": data}}
    write_json(path / "result.json", result | (untested if accuracy is None else tested))
    lines = [{"step": 50, "loss": 3.0, "lr": 0.1}, {"step": 100, "loss": 1.0, "lr": 0.0}]
    lines.append({"step": 100, "agreement": 0.9, "held_out_loss": 1.2})
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


PIXELS = {"method": "guided", "guidance_step": 0.1, "guide_from": 1.0, "refine_steps": 40}
INVERSION = {"method": "deepinversion(steps=70)"}
WEAK = {"noise": (0.2, {"method": "noise"}), "unguided": (0.5, {"method": "guided", "guidance_step": 0.0})}
STRONG = {"in_pixels": (0.6, PIXELS), "inverted": (0.4, INVERSION)}  # whatever their names


def write_run(root: Path, baselines: Mapping[str, tuple[float, Mapping[str, Any]]] = WEAK, seed: int = 0) -> Path:
    """A run with every part. baselines: by name, their student's accuracy and the settings of their images."""
    teacher = write_teacher(root / "teacher")
    images = write_images(root / "synthetic", teacher_digest=teacher.digest(), seed=seed)
    write_student(root / "student", 23 / 30, open_folder(images).digest[:16])
    right = {"student": np.arange(30) < 23, "teacher": np.arange(30) < 28}
    for name, (accuracy, options) in baselines.items():
        folder = root / "baselines" / name
        write_images(folder / "synthetic", count=6, guided=False, seed=seed)
        write_json(folder / "synthetic" / "settings.json", {"command": "", "options": options, "versions": {}})
        write_student(folder / "student", accuracy)
        right[f"baselines/{name}"] = np.arange(30) < 30 * accuracy
    bins = [{"images": 10, "probability": 0.6, "accuracy": 0.5}, {"images": 20, "probability": 0.95, "accuracy": 0.9}]
    test = {
        "accuracy": 23 / 30,
        "teacher_accuracy": 28 / 30,
        "agreement": 0.8,
        "outcomes": {"both_right": 23, "student_only": 0, "teacher_only": 5, "both_wrong": 2, "same_wrong": 1},
        "calibration": 0.05,
        "teacher_calibration": 0.02,
        "reliability": bins,
        "teacher_reliability": bins,
        "per_class": dict(zip(CLASS_NAMES, (0.8, 0.9, 0.6), strict=True)),
        "teacher_per_class": dict(zip(CLASS_NAMES, (0.9, 1.0, 0.9), strict=True)),
        "confusion": CONFUSION,
    }
    mistake = {"truth": "two", "student": "zero", "student_probability": 0.97}
    mistake |= {"teacher": "two", "teacher_probability": 0.88}
    tests = {"data": "digits-on-photos", "split": "test", "images": 30, "student": test, "mistakes": [mistake]}
    tests["baselines"] = {name: {"accuracy": accuracy} for name, (accuracy, _) in baselines.items()}
    write_json(root / "evaluation.json", tests)
    (root / "evaluation").mkdir()
    np.savez(root / "evaluation" / "right.npz", **right)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(root / "evaluation" / "mistakes.png")
    return root
