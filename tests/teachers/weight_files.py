"""Weight files as people have them, of one small network that tells dark, grey and bright images apart."""

import argparse
import datetime
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

NAMES = ("bright", "dark", "grey")
SOURCE = """
from torch import nn

def net(num_classes):
    features = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(features, nn.Linear(3, num_classes))

net.input_size, net.mean, net.std = 12, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
"""
Weights = dict[str, Tensor]


class Recipe:
    """An object of somebody's program, which a pickle would have to build."""

    def __init__(self) -> None:
        self.rates = {"lr": np.float64(0.1)}


def weights() -> Weights:
    """Of SOURCE's network, exact in half precision: mean brightness tells the classes apart, at about .2 and .8."""
    slope = (
        torch.tensor([2.0, -2.0, 0.0])[:, None].expand(3, 3).contiguous()
    )  # a row a class, in units of (x - .5) / .25
    return {
        "0.0.weight": torch.full((3,), 0.5),
        "0.0.bias": torch.zeros(3),
        "0.0.running_mean": torch.zeros(3),
        "0.0.running_var": torch.full((3,), 0.25),
        "0.0.num_batches_tracked": torch.tensor(7),
        "1.weight": slope,
        "1.bias": torch.tensor([0.0, 0.0, 6.0]),
    }


def prefixed(prefix: str) -> Weights:
    return {prefix + name: value for name, value in weights().items()}


def floats(change: Callable[[Tensor], Tensor]) -> Weights:
    return {name: change(value) if value.is_floating_point() else value for name, value in weights().items()}


def _without(word: str) -> Weights:
    return {name: value for name, value in weights().items() if word not in name}


def _adam() -> dict[str, Any]:
    return {"state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}


# Name -> what torch.save gets; each is the same network.
SAVED: dict[str, Callable[[], Any]] = {
    "plain": weights,
    "state_dict": lambda: {"state_dict": weights(), "epoch": 3, "optimizer": _adam()},
    "model": lambda: {"model": weights(), "epoch": 3},
    "model_state_dict": lambda: {"epoch": 3, "model_state_dict": weights(), "optimizer_state_dict": _adam()},
    "net": lambda: {"net": prefixed("module."), "acc": 96.1},
    "own key": lambda: {"backbone": weights(), "optimizer": _adam()},
    "average": lambda: {"state_dict_ema": prefixed("module.")},
    "beside an average": lambda: {"model_ema": floats(torch.zeros_like), "model": weights()},
    "nested": lambda: {"checkpoint": {"state_dict": prefixed("module."), "step": 3}},
    "flat with numbers": lambda: {**weights(), "epoch": 3},
    "parallel": lambda: prefixed("module."),
    "compiled": lambda: prefixed("_orig_mod."),
    "parallel, compiled": lambda: prefixed("module._orig_mod."),
    "compiled, parallel": lambda: prefixed("_orig_mod.module."),
    "parallel inside": lambda: {name.replace("0.0.", "0.module.0."): value for name, value in weights().items()},
    "lightning": lambda: {"state_dict": {**prefixed("model."), "loss.weight": torch.ones(3)}, "callbacks": {}},
    "lightning net": lambda: {"state_dict": prefixed("net."), "hyper_parameters": {"lr": 0.1}},
    "swa": lambda: {"n_averaged": torch.tensor(5), **prefixed("module.")},
    "no counters": lambda: _without("num_batches_tracked"),
    "numpy scalar": lambda: {"state_dict": weights(), "best_acc": np.float64(0.96), "n": np.int64(3)},
    "arguments": lambda: {"state_dict": weights(), "args": argparse.Namespace(lr=0.1, out=Path("x"))},
    "other objects": lambda: {
        "state_dict": weights(),
        "recipe": Recipe(),
        "at": datetime.datetime(2024, 1, 2),
        "s": {1},
    },
    "half": lambda: floats(Tensor.half),
    "bfloat16": lambda: floats(Tensor.bfloat16),
    "double": lambda: floats(Tensor.double),
    "parameters": lambda: floats(nn.Parameter),
}


def _legacy(content: Any, file: Path) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


# Name -> what writes it; each is the same network too.
WRITTEN: dict[str, Callable[[Path], object]] = {
    "UPPER.SAFETENSORS": lambda file: safetensors.torch.save_file(weights(), file),
    "half.safetensors": lambda file: safetensors.torch.save_file(floats(Tensor.half), file),
    "safetensors_inside.pth": lambda file: safetensors.torch.save_file(weights(), file),
    "legacy.pth": lambda file: _legacy(weights(), file),
    "legacy_objects.tar": lambda file: _legacy(SAVED["other objects"](), file),
    "no_suffix": lambda file: torch.save(weights(), file),
}


def _zipped(*names: str) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")

    return write


def _truncated(file: Path) -> None:
    buffer = io.BytesIO()
    torch.save(weights(), buffer)
    file.write_bytes(buffer.getvalue()[:-200])


def _packed(file: Path) -> None:
    with tarfile.open(file, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))


def _whole() -> nn.Module:
    return nn.Linear(2, 2)


# Name -> what writes it, and what the refusal says.
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "nan.pth": (lambda f: torch.save(floats(lambda v: v * float("nan")), f), "not finite"),
    "inf.safetensors": (lambda f: safetensors.torch.save_file(floats(lambda v: v / 0), f), "not finite"),
    "complex.pth": (lambda f: torch.save(floats(lambda v: v.to(torch.complex64)), f), "complex"),
    "quantised.pth": (
        lambda f: torch.save(floats(lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8)), f),
        "quantised",
    ),
    "sparse.pth": (lambda f: torch.save(floats(Tensor.to_sparse), f), "sparse"),
    "html.pth": (lambda f: f.write_text("\n<!DOCTYPE html><html><body>404</body></html>"), "a web page"),
    "lfs.pth": (
        lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"),
        "git lfs pull",
    ),
    "empty.pth": (lambda f: f.write_bytes(b""), "an empty file"),
    "text.pth": (lambda f: f.write_text("weights"), "neither safetensors nor PyTorch's"),
    "index.json": (lambda f: f.write_text('{"weight_map": {}}'), "JSON text"),
    "cut.pth": (_truncated, "it is damaged"),
    "cut.safetensors": (lambda f: f.write_bytes(safetensors.torch.save(weights())[:-8]), "damaged"),
    "whole.pth": (lambda f: torch.save(_whole(), f), r"torch\.nn\.modules\.linear\.Linear"),
    "whole_inside.pth": (lambda f: torch.save({"net": _whole(), "acc": 1.0}, f), r"torch\.nn\.modules\.linear\.Linear"),
    "whole_legacy.pth": (lambda f: _legacy(_whole(), f), r"torch\.nn\.modules\.linear\.Linear"),
    "script.pth": (lambda f: torch.jit.script(_whole()).save(f), r'TorchScript.*torch\.jit\.load\("script\.pth"\)'),
    "exported.pt2": (_zipped("m/archive_format", "m/models/model.json"), r"torch\.export\.load"),
    "keras.h5": (lambda f: f.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "HDF5"),
    "model.keras": (_zipped("config.json", "model.weights.h5"), "a Keras model"),
    "arrays.npz": (lambda f: np.savez(f, a=np.zeros(2)), "NumPy"),
    "a.zip": (_zipped("weights.pth"), "a zip archive"),
    "a.tar.gz": (_packed, "a packed archive"),
    "graph.onnx": (lambda f: f.write_bytes(b"\x08\x08\x12\x07pytorch"), "an ONNX graph"),
    "graph.pth": (lambda f: f.write_bytes(b"\x08\x0a\x12\x07pytorch\x1a"), "an ONNX graph"),
    "nothing.pth": (lambda f: torch.save({"epoch": 3}, f), "without weights by name"),
    "list.pth": (lambda f: torch.save([torch.zeros(2)], f), "a list without weights by name"),
    "two.pth": (lambda f: torch.save({"a": weights(), "b": weights()}, f), "several: a, b"),
    "two_networks.pth": (lambda f: torch.save(prefixed("teacher.") | prefixed("student."), f), "student. and teacher."),
    "more.pth": (lambda f: torch.save({**weights(), "head.weight": torch.zeros(2)}, f), "1 unknown, e.g. head.weight"),
    "less.pth": (lambda f: torch.save(_without("bias"), f), "2 absent, e.g. 0.0.bias"),
}


def write_described(folder: Path) -> str:
    """SOURCE as a file in the folder; the architecture that names its network."""
    (folder / "net.py").write_text(SOURCE)
    return f"file:{folder / 'net.py'}:net"


def describe(folder: Path) -> None:
    """config.json of a folder of ours, for model.safetensors beside it."""
    facts = {"architecture": write_described(folder), "class_names": NAMES, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    (folder / "config.json").write_text(json.dumps({**facts, "input_size": 12}))
