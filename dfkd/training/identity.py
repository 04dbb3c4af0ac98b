"""The identity of a run: everything that its student depends on."""

import hashlib
from dataclasses import asdict
from typing import Any

from torch import nn

from dfkd.training.settings import COMPUTATION, DistillSettings
from dfkd.data.loader import Images
from dfkd.teachers.classifier import Classifier


def identity(data: Images, teacher: Classifier, architecture: str, settings: DistillSettings) -> dict[str, Any]:
    """Plain JSON values by field; two runs of one identity may share a folder. Data and teacher go in by content."""
    return {
        **{key: value for key, value in settings_of(settings).items() if key not in COMPUTATION},
        "student": architecture,
        "teacher": f"{teacher.architecture} {_digest(teacher.module)[:16]}",
        "normalisation": f"{teacher.input_size} {teacher.mean} {teacher.std}",
        "data": data.digest[:16],
    }


def settings_of(settings: DistillSettings) -> dict[str, Any]:
    """The fields of DistillSettings alone, of an instance that may have more."""
    names = DistillSettings.__dataclass_fields__
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(settings).items()
        if key in names
    }


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()
