"""dfkd-export: a student or a teacher -> one ONNX file."""

import sys
from collections.abc import Sequence
from typing import Any

from dfkd.cli.parse import command
from dfkd.config import ExportCommand

COMMAND = "dfkd-export"


def run(asked: ExportCommand) -> dict[str, Any]:
    """Load, export, try, put in place; returns the file and what it was found to be."""
    from dfkd.errors import UsageError
    from dfkd.files import make_writable, replace_file
    from dfkd.onnx_file import INPUT, OUTPUT, onnx_model, require_packages, verify
    from dfkd.teachers import Classifier

    require_packages()
    if not asked.checkpoint.is_dir():
        raise UsageError(f"no folder {asked.checkpoint}", todo="give OUT/last of dfkd-distill, or a teacher's folder")
    classifier = Classifier.from_pretrained(asked.checkpoint)
    out = asked.out or asked.checkpoint / "model.onnx"
    make_writable(out.parent)
    content = onnx_model(classifier, asked.images, asked.opset)
    error = verify(content, classifier, asked.images)
    replace_file(out, lambda file: file.write(content))
    side = classifier.input_size
    return {
        "out": out,
        "bytes": len(content),
        "architecture": classifier.architecture,
        "input": {"name": INPUT, "dtype": asked.images, "shape": ["batch", 3, side, side]},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["batch", len(classifier.class_names)]},
        "opset": asked.opset,
        "class_names": classifier.class_names,
        "error": error,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Exit with the command's status."""
    sys.exit(command(ExportCommand, run, COMMAND, argv))


if __name__ == "__main__":
    main()
