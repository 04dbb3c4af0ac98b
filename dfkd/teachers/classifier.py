"""A trained network together with what it takes to feed it and to read it; on disk, model.safetensors and config.json.

config.json: architecture, num_classes, class_names, input_size, mean, std, and whatever the writer adds.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dfkd.config import NORMALISATIONS, TeacherConfig
from dfkd.errors import UsageError
from dfkd.files import read_object, replace_file, replace_text
from dfkd.rgb import square
from dfkd.teachers import adapters, zoo
from dfkd.teachers.adapters import Channels

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_SHAPE = {"architecture": str, "class_names": [str], "mean": [float], "std": [float], "input_size": int}


@dataclass(frozen=True)
class Classifier:
    """A teacher or a student: called with images, it gives logits [B, len(class_names)].

    module        normalised images [B, 3, input_size, input_size] -> logits
    mean, std     per channel, of images in 0..1
    architecture  the name that `build` takes; "" for a module of your own, which can be saved but not built again
    source        what it was loaded from, "" for a module of your own
    """

    module: nn.Module
    class_names: tuple[str, ...]
    mean: Channels
    std: Channels
    input_size: int
    architecture: str = ""
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3:
            why = "images have three channels"
            raise UsageError(f"a classifier of mean {self.mean} and std {self.std}", why, "give three numbers each")
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "mean", tuple(map(float, self.mean)))
        object.__setattr__(self, "std", tuple(map(float, self.std)))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        architecture: str | None = None,
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: int | None = None,
    ) -> Self:
        """A classifier in evaluation mode, on the CPU, every weight found and used.

        source: a folder of `save_pretrained` (of dfkd-train-teacher, or OUT/last of dfkd-distill) or its
        model.safetensors; a pretrained `timm:NAME`, `torchvision:NAME` or `transformers:FOLDER_OR_ID`; or another
        .safetensors, .pth or .pt file (a state dict, or a dict that holds one as `state_dict` or `model`; keys may
        start with `module.`), which needs architecture, class_names, mean and std.
        The other arguments override what the source says.

        Raises UsageError: something is missing, or architecture, class count or any weight does not fit.
        """
        given = {"class_names": class_names, "mean": mean, "std": std, "input_size": input_size}
        if isinstance(source, str) and adapters.handles(source):
            found: dict[str, Any] = {**adapters.pretrained(source)._asdict(), "architecture": source}
        else:
            found = _read(Path(source), architecture, given)
        if class_names is not None and len(class_names) != (count := len(found["class_names"])):
            what = f"{len(class_names)} class names for a {found['architecture']} of {count} classes"
            raise UsageError(what, "every logit has one name")
        given |= {"source": str(source)}
        return cls(**(found | {key: value for key, value in given.items() if value is not None}))

    def save_pretrained(self, folder: str | Path, **facts: Any) -> None:
        """Write folder/model.safetensors and folder/config.json, which also holds `facts` (in JSON's types).

        Each file is whole or absent.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        known = {
            spec.name: getattr(self, spec.name)
            for spec in dataclasses.fields(self)
            if spec.name not in ("module", "source")
        }
        config = {**facts, **known, "num_classes": len(self.class_names)}
        # contiguous(): safetensors keeps no strides, and training leaves weights channels-last.
        weights = {key: value.detach().cpu().contiguous() for key, value in self.module.state_dict().items()}
        content = safetensors.torch.save(weights)
        replace_file(folder / WEIGHTS, lambda file: file.write(content))
        replace_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")

    def __call__(self, images: Tensor | Image.Image | Sequence[Image.Image]) -> Tensor:
        """Logits [B, C] of images [B, 3, H, W] in 0..1 (or uint8), or of PIL images of any size.

        A PIL image's shorter side is resized to input_size and its centre cut out.
        """
        if isinstance(images, Image.Image):
            images = [images]
        if not isinstance(images, Tensor):
            images = torch.stack([_pixels(image, self.input_size) for image in images])
        if not images.is_floating_point():
            images = images.float() / 255
        return self.logits(images.to(self.device))

    def logits(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1, on the network's device -> logits [B, C], differentiable."""
        logits: Tensor = self.module(self.prepare(images))
        return logits

    def prepare(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1, any float dtype -> resized and normalised, differentiable.

        Resizing is bicubic without antialiasing, as in the published guidance, and only where the size differs.
        """
        if images.shape[-2:] != (self.input_size, self.input_size):
            size = [self.input_size, self.input_size]
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
        mean = images.new_tensor(self.mean).view(1, 3, 1, 1)
        std = images.new_tensor(self.std).view(1, 3, 1, 1)
        return (images - mean) / std

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU for a network without any."""
        return next((tensor.device for tensor in self.module.state_dict().values()), torch.device("cpu"))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The module moved in place, with `nn.Module.to`'s arguments; returns self."""
        self.module.to(*args, **kwargs)
        return self

    def eval(self) -> Self:
        """The module in evaluation mode; returns self."""
        self.module.eval()
        return self

    def freeze(self, device: torch.device | str = "cpu") -> Self:
        """For inference on `device`: evaluation mode, no gradients of weights, channels-last; returns self."""
        self.module.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """The module's parameters."""
        return self.module.parameters()

    def state_dict(self) -> dict[str, Any]:
        """The module's weights and buffers by name."""
        return self.module.state_dict()

    def replace(self, **fields: Any) -> Self:
        """A copy with some fields replaced; the module itself is shared."""
        return dataclasses.replace(self, **fields)

    def digest(self) -> str:
        """SHA-256 over architecture, every weight and buffer, and how images are prepared."""
        digest = hashlib.sha256(f"{self.architecture} {self.input_size} {self.mean} {self.std}".encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def batch_norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """The layers whose running statistics describe the training data, in definition order; () for e.g. a ViT.

        Synchronised and frozen ones are among them, whose tensors are those of a BatchNorm2d.
        """
        return tuple(
            cast(nn.BatchNorm2d, layer)
            for layer in self.module.modules()
            if (isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm) or is_frozen(layer))
            and layer.running_mean is not None
        )

    def described(self) -> str:
        """One line for people: what it is and what it is fed."""
        channels = [", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std)]
        name, side = self.architecture or type(self.module).__name__, self.input_size
        fed = f"fed {side} x {side} pixels, mean {channels[0]}, std {channels[1]}"
        return f"{name}, {len(self.class_names)} classes, {fed}"


def is_frozen(layer: nn.Module) -> bool:
    """Whether it is the layer that torchvision and detectron2 have by this name, whose four tensors are buffers."""
    return type(layer).__name__ == "FrozenBatchNorm2d"


def load_teacher(config: TeacherConfig, class_names: Sequence[str] = ()) -> Classifier:
    """The classifier that the settings describe, in evaluation mode, on the CPU.

    class_names: names for a source that states none, where `config.classes` is empty too (those of the images).
    Raises UsageError: nothing is given, what `Classifier.from_pretrained` raises, or --classes that a folder of dfkd
    contradicts: its order of logits is its own.
    """
    source = config.checkpoint or config.teacher
    if source is None:
        todo = "give --teacher-checkpoint FOLDER, or --teacher timm:NAME"
        raise UsageError("no teacher is given", "labels come from it", todo)
    mean, std = NORMALISATIONS[config.normalisation] if config.normalisation else (None, None)
    ours = config.checkpoint is not None and _config_of(config.checkpoint) is not None
    nameless = not ours and (config.checkpoint is not None or str(source).startswith("timm:"))
    names = config.classes or (tuple(class_names) if nameless else ())
    teacher = Classifier.from_pretrained(
        source,
        architecture=config.teacher,
        class_names=None if ours else names or None,
        mean=config.mean or mean,
        std=config.std or std,
        input_size=config.input_size,
    )
    if config.classes and config.classes != teacher.class_names:
        raise UsageError(
            f"--classes names {len(config.classes)} classes: {', '.join(config.classes[:10])}",
            f"the teacher has {len(teacher.class_names)}: {', '.join(teacher.class_names[:10])}",
            "leave --classes out, or give the teacher's in its order",
        )
    return teacher


def _config_of(checkpoint: Path) -> Path | None:
    """config.json beside the weights that a folder of save_pretrained, or its weight file, stands for; else None."""
    if checkpoint.is_dir():
        return checkpoint / CONFIG
    beside = checkpoint.parent / CONFIG
    return beside if checkpoint.name == WEIGHTS and beside.exists() else None


def _read(checkpoint: Path, architecture: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a classifier on disk, its module filled."""
    if not checkpoint.exists():
        if str(checkpoint) in zoo.names():
            raise UsageError(f"'{checkpoint}' has no weights of its own", todo="give a checkpoint beside the name")
        todo = "give a folder, a .safetensors, .pth or .pt file, or timm:NAME"
        raise UsageError(f"no checkpoint {checkpoint}", todo=todo)
    for part in ("last", "student/last"):
        if checkpoint.is_dir() and not (checkpoint / CONFIG).exists() and (checkpoint / part / CONFIG).exists():
            raise UsageError(f"{checkpoint} is a run's folder", "its network lies deeper", f"give {checkpoint / part}")
    if (file := _config_of(checkpoint)) is not None:
        found, weights = _read_config(file), file.parent / WEIGHTS
        if architecture is not None and found["architecture"] not in ("", architecture):
            what = f"{checkpoint} holds a {found['architecture']}, not a {architecture}"
            raise UsageError(what, todo="leave the name out or correct it")
        found["architecture"] = found["architecture"] or architecture or ""
        if not found["architecture"]:
            why = "it was saved from a module without an architecture's name"
            raise UsageError(f"{checkpoint} cannot be built", why, "give file:PATH.py:FUNCTION as the architecture")
    else:
        needed = {"architecture": architecture, **{key: given[key] for key in ("class_names", "mean", "std")}}
        if absent := [key.replace("_", " ") for key, value in needed.items() if not value]:
            what = f"{checkpoint} alone does not describe a classifier"
            raise UsageError(what, f"missing: {', '.join(absent)}", "give them as options")
        found, weights = {**needed, "input_size": zoo.input_size(str(architecture))}, checkpoint
    found["module"] = zoo.build(found["architecture"], len(found["class_names"]))
    _fill(found["module"], _read_weights(weights), weights, found["architecture"], len(found["class_names"]))
    return found


def _fill(module: nn.Module, weights: Mapping[str, Tensor], file: Path, architecture: str, classes: int) -> None:
    own = module.state_dict()
    kinds = {"absent": sorted(own.keys() - weights.keys()), "unknown": sorted(weights.keys() - own.keys())}
    facts = [f"{len(keys)} {kind}, e.g. {keys[0]}" for kind, keys in kinds.items() if keys]
    shapes = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    facts += [f"{key} is {tuple(weights[key].shape)}, wanted {tuple(own[key].shape)}" for key in shapes[:2]]
    if facts:
        what = f"{file} does not fit {architecture} with {classes} classes"
        raise UsageError(what, "; ".join(facts), "check the architecture and the class names")
    module.load_state_dict(weights, strict=True)
    module.eval()


def _read_weights(file: Path) -> dict[str, Tensor]:
    found: Any
    try:
        if file.suffix == ".safetensors":
            found = safetensors.torch.load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(f"no file {file}", "the checkpoint is incomplete") from error
    except OSError as error:
        raise UsageError(f"cannot read {file}", error.strerror or str(error)) from error
    except Exception as error:  # the bytes lead torch.load anywhere; what it advises is not safe
        kind = "safetensors" if file.suffix == ".safetensors" else "PyTorch"
        why = f"it is damaged, no {kind} file, or holds other objects than tensors"
        raise UsageError(f"cannot read {file}", why, "give tensors only: safetensors, or a state dict") from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UsageError(f"{file} holds no state dict", todo="save model.state_dict(), or a dict with key state_dict")
    return {key.removeprefix("module."): value for key, value in found.items()}


def _read_config(file: Path) -> dict[str, Any]:
    config = read_object(file, _SHAPE, "give a folder that dfkd wrote", needed=_SHAPE)
    return {key: config[key] for key in _SHAPE}


def _pixels(image: Image.Image, side: int) -> Tensor:
    """uint8 [3, side, side]: resized (bicubic, antialiased) so that the shorter side fits, the centre cut out."""
    return torch.from_numpy(np.array(square(image, side))).permute(2, 0, 1)
