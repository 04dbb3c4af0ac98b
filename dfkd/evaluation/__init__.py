"""Real data, measurements and the report: what is read only before the teacher exists and after the student is done."""

from dfkd.evaluation.accuracy import evaluate
from dfkd.evaluation.answers import Evaluation
from dfkd.evaluation.real_data import (
    check_data,
    class_names_of,
    described,
    learned_from,
    open_images,
    open_splits,
    open_test,
)

__all__ = [
    "Evaluation",
    "check_data",
    "class_names_of",
    "described",
    "evaluate",
    "learned_from",
    "open_images",
    "open_splits",
    "open_test",
]
