"""dfkd-export: a student or a teacher -> one ONNX file."""

import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from dfkd.cli.options import command, option

COMMAND = "dfkd-export"


@dataclass(frozen=True)
class Options:
    """Write a classifier as an ONNX file that needs neither this program nor torch.

    Images [batch, 3, size, size] go in as they come from a file and logits come out: the normalisation is inside, class
    names and sizes are in the metadata. ONNX Runtime has to give torch's logits before the file is put in place.
    """

    checkpoint: Path = option(MISSING, "folder of a student (OUT/last of dfkd-distill) or of dfkd-train-teacher")
    out: Path | None = option(None, "file to write; model.onnx in the folder")
    images: str = option("float32", "what goes in: float32 in 0..1, or uint8 in 0..255", choices=("float32", "uint8"))
    opset: int = option(18, "version of ONNX's operators", low=18, high=23)


def run(options: Options) -> dict[str, Any]:
    """Load, export, try, put in place; returns the file and what it was found to be."""
    # Imported here and not above: torch takes a second to load, which --help and a wrong option need not wait for.
    from dfkd.errors import UsageError
    from dfkd.files import make_writable, replace_file
    from dfkd.onnx_file import INPUT, OUTPUT, onnx_model, require_packages, verify
    from dfkd.teachers import checkpoint

    require_packages()
    if not options.checkpoint.is_dir():
        raise UsageError(f"no folder {options.checkpoint}", todo="give OUT/last of dfkd-distill, or a teacher's folder")
    classifier = checkpoint.load(None, options.checkpoint)
    out = options.out or options.checkpoint / "model.onnx"
    make_writable(out.parent)
    content = onnx_model(classifier, options.images, options.opset)
    error = verify(content, classifier, options.images)
    replace_file(out, lambda file: file.write(content))
    side = classifier.input_size
    return {
        "out": out,
        "bytes": len(content),
        "architecture": classifier.architecture,
        "input": {"name": INPUT, "dtype": options.images, "shape": ["batch", 3, side, side]},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["batch", len(classifier.class_names)]},
        "opset": options.opset,
        "class_names": classifier.class_names,
        "error": error,
    }


def main(argv: Sequence[str] | None = None) -> None:
    sys.exit(command(Options, run, COMMAND, argv))
