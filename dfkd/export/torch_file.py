"""A classifier as a program of torch.export: one .pt2 file that torch runs without this package."""

import io
import json

import torch

from dfkd.errors import UsageError
from dfkd.export.deployed import BATCH, Deployed, Run, example, metadata
from dfkd.teachers import Classifier
from dfkd_engine.export import quiet

NAME, SUFFIX = "the program", ".pt2"
FACTS = "dfkd.json"  # inside of the file: what torch.export.load gives as an extra file
NOTES = ("stack_trace", "source_fn_stack", "torch_fn")  # the tracer's, which name files of this machine


def write(classifier: Classifier, dtype: str) -> bytes:
    """The file's content. One argument: images [batch, 3, size, size], float32 in 0..1 or uint8; gives logits.

    dtype: "float32" or "uint8", of the images. FACTS holds what `metadata` says.
    Raises UsageError where the network cannot be exported.
    """
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(
                Deployed(classifier),
                (example(classifier, dtype),),
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),
            )
    except Exception as error:  # what the tracer and its guards raise has no base of its own
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"{classifier.architecture} cannot be exported", why, "try --format onnx") from error
    for node in program.graph.nodes:
        for note in NOTES:
            node.meta.pop(note, None)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={FACTS: json.dumps(metadata(classifier))})
    return file.getvalue()


def load(content: bytes) -> Run:
    """The file by torch."""
    run: Run = torch.export.load(io.BytesIO(content)).module()
    return run
