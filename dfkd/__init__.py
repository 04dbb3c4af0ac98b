"""Data-free knowledge distillation: a frozen teacher and a frozen diffusion prior make a student's training set."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dfkd.teachers.classifier import Classifier

__all__ = ["__version__", "load_student"]

__version__ = "0.1.0"


def load_student(path: str | Path) -> "Classifier":
    """A student of dfkd-distill (OUT/last), or a teacher of dfkd-train-teacher, in evaluation mode on the CPU.

    Its logits(images) takes images [B, 3, H, W] in 0..1 and gives [B, C]; class_names, input_size, mean and std are
    there too, and the network itself, of normalised images, is ``module``. Neither diffusers nor transformers is
    loaded. Raises dfkd.errors.UsageError: no such folder, or weights that do not fit.
    """
    from dfkd.teachers import checkpoint

    return checkpoint.load(None, Path(path))
