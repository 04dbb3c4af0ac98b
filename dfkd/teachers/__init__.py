"""Teachers and students: networks by name, their checkpoints, and what it takes to feed and to read them."""

from dfkd.teachers.classifier import Classifier
from dfkd.teachers.loading import load_teacher
from dfkd.teachers.zoo import build, check, input_size, names

__all__ = ["Classifier", "build", "check", "input_size", "load_teacher", "names"]
