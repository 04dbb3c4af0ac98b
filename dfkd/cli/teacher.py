"""A teacher from the options of a command."""

from pathlib import Path

from dfkd.config import NORMALISATIONS
from dfkd.errors import UsageError
from dfkd.teachers import checkpoint
from dfkd.teachers.classifier import Classifier


def load_teacher(
    name: str | None, file: Path | None, normalisation: str | None, class_names: tuple[str, ...]
) -> Classifier:
    """The teacher by architecture and checkpoint, as dfkd.teachers.checkpoint.load takes them.

    A folder written by dfkd states its class names, and they are kept; any other checkpoint takes ``class_names``, in
    the order of its logits. normalisation, where given, overrides the checkpoint's own.
    Raises UsageError for an unknown normalisation, and all that ``load`` raises.
    """
    if normalisation is not None and normalisation not in NORMALISATIONS:
        known = ", ".join(NORMALISATIONS)
        raise UsageError(f"normalisation {normalisation!r} is unknown", f"known are {known}", "choose one of them")
    mean, std = (None, None) if normalisation is None else NORMALISATIONS[normalisation]
    stated = file is not None and file.is_dir()
    return checkpoint.load(name, file, None if stated else class_names, mean, std)
