"""What a teacher is made of, by the files and names that the options give. No torch is loaded."""

import json
from collections.abc import Callable
from pathlib import Path

from dfkd.errors import UsageError

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # of a folder that dfkd wrote


def described(
    name: str | None,
    checkpoint: Path | None,
    normalisation: str | None,
    class_names: tuple[str, ...],
    digest: Callable[[Path], str],
) -> dict[str, str]:
    """Fields that change with anything that changes the teacher's graph or weights.

    Raises UsageError: no teacher is given, or its files cannot be read.
    """
    if checkpoint is None:
        if name is None:
            todo = "give --teacher-checkpoint, or --teacher too, or leave the teacher's networks out with --only"
            raise UsageError("no teacher", "its gradient is part of these engines", todo)
        folder = Path(name.partition(":")[2]).expanduser()
        files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
        weights = " ".join(f"{file.relative_to(folder)} {_read(digest, file)}" for file in files)
        found = {"architecture": name, "weights": weights or "as published"}
    elif (checkpoint / CONFIG).is_file():
        try:
            config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
            architecture = str(config["architecture"])
            shape = {key: str(config[key]) for key in ("num_classes", "input_size", "mean", "std")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            todo = "give a folder that dfkd wrote"
            raise UsageError(f"cannot read {checkpoint / CONFIG}", str(error), todo) from None
        found = {"architecture": architecture, "weights": _read(digest, checkpoint / WEIGHTS), **shape}
    else:
        classes = str(len(class_names))
        found = {"architecture": name or "?", "weights": _read(digest, checkpoint), "num_classes": classes}
    prefix, _, rest = found["architecture"].partition(":")
    if prefix == "file":
        found["file"] = _read(digest, Path(rest.rpartition(":")[0]))
    return found | ({"normalisation": normalisation} if normalisation else {})


def _read(digest: Callable[[Path], str], file: Path) -> str:
    try:
        return digest(file)
    except OSError as error:
        todo = "give a folder of dfkd-train-teacher, or a .safetensors, .pth or .pt file"
        raise UsageError(f"cannot read the teacher's {file}", error.strerror or str(error), todo) from None
