"""Real data, measurements and the report: what is read only before the teacher exists and after the student is done."""

from dfkd.evaluation.accuracy import evaluate
from dfkd.evaluation.answers import Evaluation
from dfkd.evaluation.real_data import check_data, class_names_of, open_images

__all__ = ["Evaluation", "check_data", "class_names_of", "evaluate", "open_images"]
