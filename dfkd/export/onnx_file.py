"""A classifier as one ONNX file that needs nothing else."""

from typing import Any

import torch
from torch import Tensor

from dfkd.errors import UsageError
from dfkd.export.deployed import BATCH, INPUT, OUTPUT, Deployed, Run, example, metadata
from dfkd.teachers import Classifier
from dfkd_engine.backends.packages import missing
from dfkd_engine.export import quiet

NAME, SUFFIX = "the ONNX file", ".onnx"
TODO = "try another --opset"
LARGEST = 1_800_000_000  # bytes of weights: protobuf holds 2 GiB in one file


def require_packages() -> None:
    """Raise UsageError unless ONNX files can be written and tried here."""
    if absent := missing("onnx", "onnxscript", "onnxruntime"):
        raise UsageError("no ONNX file can be written", f"{', '.join(absent)} absent", "pip install 'dfkd[onnx]'")


def write(classifier: Classifier, dtype: str, opset: int) -> bytes:
    """The file's content. Input `images` [batch, 3, size, size], float32 in 0..1 or uint8; output `logits`.

    dtype: "float32" or "uint8", of the images. The metadata of the model are those of `metadata`.
    Raises UsageError: the packages are absent, the network cannot be exported, or not in that opset.
    """
    require_packages()
    deployed = Deployed(classifier)
    size = sum(value.numel() * value.element_size() for value in deployed.state_dict().values())
    if size > LARGEST:
        what = f"{classifier.architecture} has {size / 1e9:.1f} GB of weights"
        raise UsageError(what, "an ONNX file holds 2 GB", "use --format torch-export")
    try:
        with quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                deployed,
                (example(classifier, dtype),),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),
                verbose=False,
            )
            model = program.model_proto
    except Exception as error:  # exporter, version converter and torch.export share no base
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"{classifier.architecture} cannot be exported", why, TODO) from error
    written = {entry.domain: entry.version for entry in model.opset_import}[""]
    if written != opset:
        raise UsageError(
            f"--opset {opset}", f"{classifier.architecture} was written in opset {written}", "ask for that one"
        )
    for node in model.graph.node:
        del node.metadata_props[:]  # the exporter's notes name files of this machine
    for key, value in metadata(classifier).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    content: bytes = model.SerializeToString()
    return content


def load(content: bytes) -> Run:
    """The file by ONNX Runtime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return run
