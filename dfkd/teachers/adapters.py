"""Networks of other libraries; a library is imported only when its prefix is used.

timm:NAME               any timm model
torchvision:NAME        any torchvision classification model
transformers:FOLDER_OR_ID   a Hugging Face image classifier
file:PATH.py:FUNCTION   FUNCTION(num_classes) -> nn.Module, in a Python file of your own (it is executed)
"""

import importlib
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from dfkd.errors import UsageError
from dfkd.extension import resolve, running

PREFIXES = ("timm", "torchvision", "transformers", "file")
Channels = tuple[float, float, float]


class Pretrained(NamedTuple):
    """A network with published weights, in evaluation mode, and how it is fed and read.

    class_names: in the order of the logits; their numbers where the library ships no names.
    """

    module: nn.Module
    class_names: tuple[str, ...]
    mean: Channels
    std: Channels
    input_size: int


class Logits(nn.Module):
    """A transformers classifier as a plain network: pixel values [B, 3, h, w] -> logits [B, C]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


def handles(name: str) -> bool:
    """Whether the name has one of the prefixes and something behind it."""
    prefix, _, rest = name.partition(":")
    return prefix in PREFIXES and bool(rest)


def check(name: str) -> None:
    """Raise UsageError for a library that is not installed, without importing it, and for a file without the function.

    The file is executed.
    """
    prefix, _, rest = name.partition(":")
    if prefix == "file":
        resolve(rest, {}, "network")
    elif importlib.util.find_spec(prefix) is None:
        raise _absent(prefix, prefix)


def build(name: str, num_classes: int) -> nn.Module:
    """An untrained network with num_classes logits. Raises UsageError: library absent, model or file unknown, or
    a function that fails."""
    prefix, _, rest = name.partition(":")
    if prefix == "file":
        function, settings = resolve(rest, {}, "network")
        with running(f"architecture '{name}'"):
            return _module(function(num_classes, **settings), name)
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
    """The side in pixels that the network was made for; 224 where the library does not say."""
    prefix, _, rest = name.partition(":")
    if prefix == "timm":
        config = _library("timm").get_pretrained_cfg(rest, allow_unregistered=True)
        return int(config.input_size[-1]) if config else 224
    return _image_size(_processor(rest)) if prefix == "transformers" else 224


def pretrained(name: str) -> Pretrained:
    """The published weights of a timm, torchvision or transformers model.

    Raises UsageError: library absent, model unknown, no network to fetch it, or a file: name, which has no weights.
    """
    prefix, _, rest = name.partition(":")
    if prefix == "file":
        raise UsageError(f"'{name}' has no weights of its own", todo="give a checkpoint")
    library = _library(prefix)
    try:
        if prefix == "timm":
            model: Any = _module(library.create_model(rest, pretrained=True), name).eval()
            facts = library.data.resolve_model_data_config(model)
            names, side = _timm_names(library, model), int(facts["input_size"][-1])
            return Pretrained(model, names, _three(facts["mean"]), _three(facts["std"]), side)
        if prefix == "torchvision":
            weights = library.models.get_model_weights(rest).DEFAULT
            model = _module(library.models.get_model(rest, weights=weights), name).eval()
            shown, classes = weights.transforms(), tuple(weights.meta["categories"])
            return Pretrained(model, classes, _three(shown.mean), _three(shown.std), int(shown.crop_size[0]))
        model = _module(library.AutoModelForImageClassification.from_pretrained(rest), name).eval()
        facts, labels = _processor(rest), model.config.id2label
        classes = tuple(str(labels[index]) for index in sorted(labels))
        mean, std = _three(facts["image_mean"]), _three(facts["image_std"])
        return Pretrained(Logits(model).eval(), classes, mean, std, _image_size(facts))
    except (ValueError, RuntimeError, OSError) as error:
        raise UsageError(f"cannot load '{name}'", str(error), "check the name, or give a local checkpoint") from error


def _timm_names(library: ModuleType, model: Any) -> tuple[str, ...]:
    """ImageNet's first word for every class, numbered where two classes share it ("crane 134"); else the numbers."""
    if (subset := library.data.infer_imagenet_subset(model)) is None:
        return tuple(map(str, range(model.num_classes)))
    words = [text.split(", ")[0] for text in library.data.ImageNetInfo(subset).label_descriptions()]
    return tuple(word if words.count(word) == 1 else f"{word} {index}" for index, word in enumerate(words))


def _library(prefix: str) -> ModuleType:
    try:
        return importlib.import_module(prefix)
    except ModuleNotFoundError as error:
        raise _absent(prefix, error.name) from error
    except (ImportError, RuntimeError) as error:  # torchvision's, built for another torch
        raise UsageError(f"{prefix} is installed but does not load", str(error), f"reinstall {prefix}") from error


def _absent(prefix: str, package: str | None) -> UsageError:
    return UsageError(f"'{prefix}:' needs {package}", "it is not installed", f"pip install {prefix}")


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
    if missing := {"size", "image_mean", "image_std"} - set(config):
        why = "its preprocessor_config.json tells how images are fed"
        raise UsageError(f"'transformers:{rest}' does not say its {', '.join(sorted(missing))}", why)
    return config


def _image_size(processor: dict[str, Any]) -> int:
    size = processor["crop_size"] if processor.get("do_center_crop") and "crop_size" in processor else processor["size"]
    return int(size.get("height") or size["shortest_edge"]) if isinstance(size, dict) else int(size)


def _three(values: Any) -> Channels:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
