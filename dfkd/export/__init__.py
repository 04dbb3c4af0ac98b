"""Classifiers on their way out: files that run without this package, each tried against the network."""

from dfkd.errors import UsageError
from dfkd.export import onnx_file, torch_file
from dfkd.export.deployed import verify
from dfkd.teachers import Classifier

SUFFIXES = {"onnx": onnx_file.SUFFIX, "torch-export": torch_file.SUFFIX}


def export(classifier: Classifier, form: str, dtype: str = "float32", opset: int = 18) -> tuple[bytes, float]:
    """A file's content, and how far its logits are from torch's, over the largest.

    form: "onnx" or "torch-export". dtype: of the images, "float32" in 0..1 or "uint8". opset: of ONNX.
    Raises UsageError: packages are absent, the network cannot be exported, or the file answers otherwise.
    """
    file = onnx_file if form == "onnx" else torch_file
    content = onnx_file.write(classifier, dtype, opset) if form == "onnx" else torch_file.write(classifier, dtype)
    try:
        run = file.load(content)
    except Exception as error:  # onnxruntime's and torch's own share no base
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"{file.NAME} of {classifier.architecture} cannot be loaded", why) from error
    return content, verify(run, classifier, dtype, file.NAME)
