"""Weights from files as people have them: what a file is, by its content, and the state dict that it holds.

Nothing in a file is executed. torch.load reads tensors alone; other objects beside them (a Namespace of arguments,
numpy scalars, a scheduler) become inert stand-ins that are dropped.
"""

import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import safetensors.torch
import torch
from torch import Tensor

from dfkd.errors import UsageError

# Keys under which programs keep the weights that they trained, in the order in which they count; averages come last.
KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema")
_STATE = 'torch.save(net.state_dict(), "weights.pth")'
_HOME = f"in the program that made it, with its network as `net`: import torch; {_STATE}"


def read_weights(file: Path) -> dict[str, Tensor]:
    """The state dict of a safetensors file, or of a PyTorch file that holds one alone or under a key: names -> weights.

    Half precision becomes float32, which holds it exactly.
    Raises UsageError, which says what the file is: not there, of another kind, damaged, without a state dict or with
    several, or weights that are not finite, complex or quantised.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            head = opened.read(512)
    except FileNotFoundError as error:
        raise UsageError(f"no file {file}", "the checkpoint is incomplete") from error
    except OSError as error:
        raise UsageError(f"cannot read {file}", error.strerror or str(error)) from error
    if other := _other_kind(file, head, size):
        kind, todo = other
        raise UsageError(f"cannot read {file}", f"it is {kind}", todo)
    found = _read_safetensors(file) if _is_safetensors(head, size) else _state_dict(_read_pickle(file), file)
    return {name: _sound(name, value, file) for name, value in found.items()}


def _is_safetensors(head: bytes, size: int) -> bool:
    """Eight bytes with the length of a JSON header that follows."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _other_kind(file: Path, head: bytes, size: int) -> tuple[str, str] | None:
    """What a file is that torch.load and safetensors do not read, and what to do; None for what they may read."""
    again, text = "download it again", head.lstrip().lower()
    if not size:
        return "an empty file", again
    if _is_safetensors(head, size):
        return None
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer: the weights themselves were not fetched", "run: git lfs pull"
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page, and not the download that the address promised", again
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "an HDF5 file, as Keras and TensorFlow write", "convert the network to PyTorch; then, " + _HOME
    if file.suffix.lower() == ".onnx" or (
        head[:1] == b"\x08" and re.match(rb"(?s).{2,4}\x12.(pytorch|tf2onnx|keras)", head)
    ):
        return "an ONNX graph", "give the PyTorch weights that it was exported from; " + _HOME
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model", "convert the network to PyTorch; then, " + _HOME
    if head.startswith(b"GGUF"):
        return "a GGUF file of a language model", "give the weights of an image classifier"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")) or head[257:262] == b"ustar":
        return "a packed archive", "unpack it and give the weight file inside"
    if zipfile.is_zipfile(file):
        return _other_zip(file)
    if text[:1] in (b"{", b"["):
        return "JSON text", "give the weight file that lies beside it"
    if head[:1] != b"\x80":
        return "damaged, or neither safetensors nor PyTorch's", again + ", or save it again; " + _HOME
    return None


def _other_zip(file: Path) -> tuple[str, str] | None:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        load = f'net = torch.jit.load("{file.name}")'
        return "a TorchScript program", f"make a state dict of it: import torch; {load}; {_STATE}"
    if any(name.endswith("/data.pkl") for name in names):
        return None
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        load = f'net = torch.export.load("{file.name}").module()'
        return "a program of torch.export", f"make a state dict of it: import torch; {load}; {_STATE}"
    if "model.weights.h5" in names:
        return "a Keras model", "convert the network to PyTorch; then, " + _HOME
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays", "give the network's own weights; " + _HOME
    return "a zip archive", "unpack it and give the weight file inside"


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except Exception as error:  # safetensors raises an exception class of its own, and others by content
        why = "it is a damaged safetensors file, or one that is not whole"
        raise UsageError(f"cannot read {file}", why, "download it again, or save it again") from error


class Inert(dict[Any, Any]):
    """Stands for an object that is no tensor: takes what a pickle would have built it of, and does nothing with it."""

    origin = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


def _read_pickle(file: Path) -> Any:
    """What torch.load finds, other objects than tensors and plain containers replaced by Inert ones."""
    names: list[str] = []
    try:
        names = _globals(file)
        inert: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
        inert += [(type(name, (Inert,), {"origin": name}), name) for name in names]
        with torch.serialization.safe_globals(inert):  # torch's own allowed names come before these
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"cannot read {file}", error.strerror or str(error)) from error
    except Exception as error:  # the bytes lead torch.load anywhere; what it advises is not safe
        if whole := [name for name in names if name.startswith("torch.nn.modules.")]:
            _refuse(file, f"it holds a whole pickled network, with a {whole[0]}, that only its own code can open")
        why = "it is damaged, or holds other objects than tensors"
        raise UsageError(f"cannot read {file}", why, f"give a state dict of tensors only; {_HOME}") from error


def _globals(file: Path) -> list[str]:
    """The classes and functions that a PyTorch file names, "module.name" as torch.load calls them; nothing is built."""
    found: dict[str, None] = {}
    with zipfile.ZipFile(file) if zipfile.is_zipfile(file) else file.open("rb") as opened:
        if isinstance(opened, zipfile.ZipFile):
            name = next(name for name in opened.namelist() if name.endswith("/data.pkl"))
            with opened.open(name) as stream:
                _collect(stream, found)  # type: ignore[arg-type]
        else:
            for _ in range(4):  # before its storages a legacy file has a magic number, a version, sizes and the object
                _collect(opened, found)
    return list(found)


def _collect(stream: BinaryIO, into: dict[str, None]) -> None:
    renamed = {"__builtin__": "builtins", "copy_reg": "copyreg"}
    for code, argument, _ in pickletools.genops(stream):
        if code.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            into[f"{renamed.get(module, module)}.{name}"] = None


def _state_dict(found: Any, file: Path) -> dict[str, Tensor]:
    """The state dict in what was read: itself, or the one that it holds, at any depth.

    Of several, the first by KEYS, then AVERAGES, counts: the weights that were trained before averages of them.
    """
    while isinstance(found, Mapping) and not _is_state(found):
        inside = {key: value for key, value in found.items() if isinstance(value, Mapping) and _holds_state(value)}
        if not inside:
            break
        named = [key for key in (*KEYS, *AVERAGES) if key in inside]
        if not named and len(inside) > 1:
            _refuse(file, f"it holds several: {', '.join(map(str, inside))}")
        found = inside[named[0] if named else next(iter(inside))]
    values = found if isinstance(found, Mapping) else {}
    if weights := {key: value for key, value in values.items() if isinstance(key, str) and isinstance(value, Tensor)}:
        return weights
    whole = [value for value in (found, *values.values()) if isinstance(value, Inert) and value.origin]
    if whole:
        _refuse(file, f"it holds a whole pickled object, a {whole[0].origin}, that only its own code can open")
    _refuse(file, f"it holds a {type(found).__name__} without weights by name")


def _is_state(found: Mapping[Any, Any]) -> bool:
    """Names -> tensors, whatever layers keep beside them (`_extra_state`, which is no weight)."""
    values = [value for key, value in found.items() if not str(key).endswith("_extra_state")]
    return bool(values) and all(isinstance(key, str) for key in found) and all(isinstance(v, Tensor) for v in values)


def _holds_state(found: Mapping[Any, Any]) -> bool:
    """A state dict, or one inside; the numbered entries of an optimiser's state are none."""
    inside = [value for key, value in found.items() if isinstance(key, str) and isinstance(value, Mapping)]
    return _is_state(found) or any(map(_holds_state, inside))


def _refuse(file: Path, why: str) -> NoReturn:
    raise UsageError(f"{file} holds no state dict", why, _HOME)


def _sound(name: str, value: Tensor, file: Path) -> Tensor:
    """The weight in float32 where it is a float of fewer bits. Raises UsageError for what no network computes with."""
    fault = ""
    if value.is_quantized:
        fault = "quantised"
    elif value.is_complex():
        fault = "complex"
    elif value.layout != torch.strided:
        fault = "sparse"
    elif value.is_meta:
        fault = "without numbers (on the meta device)"
    elif value.is_floating_point():
        value = value.float()
        fault = "" if value.isfinite().all() else "not finite (NaN or infinite)"
    if fault:
        what = f"{file} has a weight that is {fault}: {name}"
        raise UsageError(what, "the classifier would be too", "give the weights of a training that went well, in full")
    return value
