"""Networks of other libraries behind the zoo's two functions; a library is imported only when its prefix is used.

timm:NAME               any timm model
torchvision:NAME        any torchvision classification model
transformers:FOLDER_OR_ID   a Hugging Face image classifier
file:PATH.py:FUNCTION   FUNCTION(num_classes) -> nn.Module, in a Python file of your own (it is executed)
"""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from dfkd.errors import UsageError
from dfkd.teachers.classifier import Classifier

PREFIXES = ("timm", "torchvision", "transformers", "file")


class Logits(nn.Module):
    """A transformers classifier as a plain network: pixel values [B, 3, h, w] -> logits [B, C]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


def handles(name: str) -> bool:
    prefix, colon, rest = name.partition(":")
    return prefix in PREFIXES and bool(colon and rest)


def build(name: str, num_classes: int) -> nn.Module:
    """An untrained network with num_classes logits. Raises UsageError: library absent, model or file unknown."""
    prefix, _, rest = name.partition(":")
    if prefix == "file":
        return _from_file(rest, num_classes)
    library = _library(prefix)
    try:
        if prefix == "timm":
            return _module(library.create_model(rest, pretrained=False, num_classes=num_classes), name)
        if prefix == "torchvision":
            return _module(library.models.get_model(rest, weights=None, num_classes=num_classes), name)
        config = library.AutoConfig.from_pretrained(rest, num_labels=num_classes)
        return Logits(_module(library.AutoModelForImageClassification.from_config(config), name))
    except (ValueError, RuntimeError, OSError) as error:
        raise UsageError(f"cannot build '{name}'", str(error)) from error


def input_size(name: str) -> int:
    """The side in pixels that the network was made for; file: networks say it themselves as `input_size`, else 224."""
    prefix, _, rest = name.partition(":")
    if prefix == "timm":
        library = _library("timm")
        config = library.get_pretrained_cfg(rest, allow_unregistered=True)
        return int(config.input_size[-1]) if config else 224
    if prefix == "transformers":
        return _image_size(_processor(rest))
    return 224


def pretrained(name: str) -> Classifier:
    """The published weights of a timm, torchvision or transformers model, with their classes and normalisation.

    Raises UsageError: library absent, model unknown, no network to fetch it, or a file: name, which has no weights.
    """
    prefix, _, rest = name.partition(":")
    if prefix == "file":
        raise UsageError(f"'{name}' has no weights of its own", todo="give a checkpoint")
    library = _library(prefix)
    try:
        if prefix == "timm":
            return _pretrained_timm(library, name, rest)
        if prefix == "torchvision":
            return _pretrained_torchvision(library, name, rest)
        return _pretrained_transformers(library, name, rest)
    except (ValueError, RuntimeError, OSError) as error:
        raise UsageError(f"cannot load '{name}'", str(error), "check the name, or give a local checkpoint") from error


def _pretrained_timm(library: ModuleType, name: str, rest: str) -> Classifier:
    model: Any = _module(library.create_model(rest, pretrained=True), name)
    config = library.data.resolve_model_data_config(model)
    mean, std = _three(config["mean"]), _three(config["std"])
    # timm ships no class names with its weights.
    names = tuple(str(index) for index in range(model.num_classes))
    return Classifier(model.eval(), name, names, int(config["input_size"][-1]), mean, std)


def _pretrained_torchvision(library: ModuleType, name: str, rest: str) -> Classifier:
    weights = library.models.get_model_weights(rest).DEFAULT
    model = _module(library.models.get_model(rest, weights=weights), name)
    transform = weights.transforms()
    mean, std = _three(transform.mean), _three(transform.std)
    return Classifier(model.eval(), name, tuple(weights.meta["categories"]), int(transform.crop_size[0]), mean, std)


def _pretrained_transformers(library: ModuleType, name: str, rest: str) -> Classifier:
    model: Any = _module(library.AutoModelForImageClassification.from_pretrained(rest), name)
    processor = _processor(rest)
    labels = model.config.id2label
    names = tuple(str(labels[index]) for index in sorted(labels))
    mean, std = _three(processor["image_mean"]), _three(processor["image_std"])
    return Classifier(Logits(model).eval(), name, names, _image_size(processor), mean, std)


def _from_file(rest: str, num_classes: int) -> nn.Module:
    path, _, function = rest.rpartition(":")
    if not path.endswith(".py") or not function:
        raise UsageError(f"cannot read 'file:{rest}'", "the form is file:PATH.py:FUNCTION")
    if not Path(path).is_file():
        raise UsageError(f"no file {path}", todo="give the path of a Python file")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise UsageError(f"{path} has no function '{function}'", todo=f"define {function}(num_classes) in it")
    return _module(getattr(module, function)(num_classes), f"file:{rest}")


def _library(prefix: str) -> ModuleType:
    try:
        return importlib.import_module(prefix)
    except ModuleNotFoundError as error:
        raise UsageError(f"'{prefix}:' needs {error.name}", "it is not installed", f"pip install {prefix}") from error
    except (ImportError, RuntimeError) as error:  # torchvision's, built for another torch
        raise UsageError(f"{prefix} is installed but does not load", str(error), f"reinstall {prefix}") from error


def _module(value: object, name: str) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise UsageError(f"'{name}' gives a {type(value).__name__}", "an nn.Module is wanted")
    return value


def _processor(rest: str) -> dict[str, Any]:
    """preprocessor_config.json of a transformers model; read as data, since the processor classes want torchvision."""
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    try:
        config: dict[str, Any] = get_image_processor_config(rest)
    except (ValueError, OSError) as error:
        raise UsageError(f"cannot load 'transformers:{rest}'", str(error)) from error
    missing = {"size", "image_mean", "image_std"} - set(config)
    if missing:
        raise UsageError(
            f"'transformers:{rest}' does not say its {', '.join(sorted(missing))}", "see its image processor"
        )
    return config


def _image_size(processor: dict[str, Any]) -> int:
    size = processor["crop_size"] if processor.get("do_center_crop") and "crop_size" in processor else processor["size"]
    if isinstance(size, dict):
        size = size.get("height") or size["shortest_edge"]
    return int(size)


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
