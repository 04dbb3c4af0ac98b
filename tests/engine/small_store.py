"""Two specs and a builder of a few bytes, for tests that need a store but no compiler. Nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dfkd_engine.spec import EngineSpec, TensorSpec

SPEC = EngineSpec(
    network="decode",
    config={"size": 64, "losses": {"bn": {"weight": 0.1}}},
    components={"vae": "a" * 64},
    inputs=(TensorSpec("z", (None, 4, 8, 8), "float32"),),
    outputs=(TensorSpec("image", (None, 3, 64, 64), "float32"),),
    rows=(2, 8, 16),
    dtype="float32",
    backend="inductor",
    versions={"torch": "2.13.0"},
    device="cpu x86_64 avx2",
    flags={"freezing": "1"},
    sources="s0",
)
OTHER = replace(SPEC, components={"vae": "b" * 64})
FILES = {"model.pt2": b"compiled" * 500, "data/weights.bin": bytes(range(256)) * 20}


def make(folder: Path) -> Mapping[str, Any]:
    for name, data in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return {"parity": {"relative": 1e-6}, "seconds": 0.5}


def never(folder: Path) -> Mapping[str, Any]:
    raise AssertionError(f"nothing is to be built, {folder} was asked for")
