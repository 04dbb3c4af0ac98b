"""dfkd-export: a student or a teacher -> one file that runs without this package, and its model card."""

import sys
from collections.abc import Sequence
from typing import Any

from dfkd.cli.parse import command, save_settings
from dfkd.config import ExportCommand

COMMAND = "dfkd-export"


def run(asked: ExportCommand) -> dict[str, Any]:
    """Load, export, try, put in place; returns the file and what it was found to be."""
    from dfkd import model_card
    from dfkd.errors import UsageError
    from dfkd.export import SUFFIXES, export, onnx_file
    from dfkd.export.deployed import INPUT, OUTPUT
    from dfkd.files import make_writable, replace_file
    from dfkd.teachers import Classifier

    if asked.format == "onnx":
        onnx_file.require_packages()
    if not asked.checkpoint.is_dir():
        raise UsageError(f"no folder {asked.checkpoint}", todo="give OUT/last of dfkd-distill, or a teacher's folder")
    classifier = Classifier.from_pretrained(asked.checkpoint)
    out = asked.out or asked.checkpoint / f"model{SUFFIXES[asked.format]}"
    make_writable(out.parent)
    content, error = export(classifier, asked.format, asked.images, asked.opset)
    replace_file(out, lambda file: file.write(content))
    save_settings(asked, out.parent, COMMAND, f"{out.name}.settings.json")
    card = model_card.write_beside(out, model_card.read_facts(asked.checkpoint, classifier.config()), asked.images)
    side = classifier.input_size
    return {
        "out": out,
        "format": asked.format,
        "bytes": len(content),
        "architecture": classifier.architecture,
        "input": {"name": INPUT, "dtype": asked.images, "shape": ["batch", 3, side, side]},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["batch", len(classifier.class_names)]},
        "opset": asked.opset if asked.format == "onnx" else None,
        "class_names": classifier.class_names,
        "card": card,
        "error": error,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Exit with the command's status."""
    sys.exit(command(ExportCommand, run, COMMAND, argv))


if __name__ == "__main__":
    main()
