"""Networks of other libraries; a library is imported only when its prefix is used.

timm:NAME               any timm model
torchvision:NAME        any torchvision classification model
transformers:FOLDER_OR_ID   a Hugging Face image classifier
file:PATH.py:FUNCTION   FUNCTION(num_classes) -> nn.Module, FUNCTION() -> nn.Module, or a module, in a Python file of
                        your own (it is executed); how it is fed and read may stand on the function or the module, as
                        `input_size`, `mean`, `std` and `class_names`

Arguments of the library's or the file's function follow in parentheses: timm:vit_tiny_patch16_224(img_size=32).
"""

import copy
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from dfkd.errors import UsageError
from dfkd.extension import resolve, running, split
from dfkd.teachers.trial import Logits
from dfkd_engine.errors import first_line

PREFIXES = ("timm", "torchvision", "transformers", "file")
Channels = tuple[float, float, float]


class Pretrained(NamedTuple):
    """A network with weights, in evaluation mode, and what its source says of how it is fed and read.

    classes: the number of logits. class_names: in their order, () where the source has none. mean, std, input_size:
    None where the source does not say, and so resize: "antialias" or "published".
    """

    module: nn.Module
    classes: int
    class_names: tuple[str, ...]
    mean: Channels | None
    std: Channels | None
    input_size: int | None
    resize: str | None = None


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
        return _from_file(name, num_classes)
    library = _library(prefix)
    rest, settings = split(rest) if prefix != "transformers" else (rest, {})
    try:
        if prefix == "timm":
            return _module(library.create_model(rest, pretrained=False, num_classes=num_classes, **settings), name)
        if prefix == "torchvision":
            return _module(library.models.get_model(rest, weights=None, num_classes=num_classes, **settings), name)
        config = library.AutoConfig.from_pretrained(rest, num_labels=num_classes)
        return Logits(_module(library.AutoModelForImageClassification.from_config(config), name), "logits")
    except (ValueError, RuntimeError, OSError, TypeError) as error:
        raise UsageError(f"cannot build '{name}'", first_line(error)) from error


def _from_file(name: str, num_classes: int) -> nn.Module:
    """What the file gives: a module, or that of a function, which is told the number of classes where it takes one."""
    found, settings = resolve(name.partition(":")[2], {}, "network")
    if isinstance(found, nn.Module):
        return copy.deepcopy(found)
    with running(f"architecture '{name}'"):
        parameters = inspect.signature(found).parameters
        first = next(iter(parameters.values()), None)
        if "num_classes" in parameters:
            settings = {"num_classes": num_classes, **settings}
        elif first and first.default is first.empty and first.kind is not first.VAR_KEYWORD:
            return _module(found(num_classes, **settings), name)
        return _module(found(**settings), name)


def stated(name: str, module: nn.Module | None = None) -> dict[str, Any]:
    """How a `file:` network says that it is fed and read: those of STATED that stand on its module or its function.

    Tensors of these names are the network's own. Raises UsageError for what none of them can be.
    """
    found, _ = resolve(name.partition(":")[2], {}, "network")
    facts = {}
    for key, wanted in STATED.items():
        value = getattr(module, key, getattr(found, key, None))
        if value is None or isinstance(value, Tensor | nn.Module) or callable(value):
            continue
        try:
            facts[key] = _READ[key](value)
        except (TypeError, ValueError):
            raise UsageError(f"{name} has {key} = {value!r}", f"wanted is {wanted}", "correct it in the file") from None
    return facts


STATED = {
    "input_size": "a side in pixels",
    "mean": "three numbers",
    "std": "three numbers",
    "class_names": "a list of names",
}


def input_size(name: str) -> int:
    """The side in pixels that a new network is trained at unless another is given: what its library or its file says,
    else 224."""
    prefix, _, rest = name.partition(":")
    if prefix == "timm":
        config = _library("timm").get_pretrained_cfg(split(rest)[0], allow_unregistered=True)
        return int(config.input_size[-1]) if config else 224
    if prefix == "file":
        return int(stated(name).get("input_size", 224))
    return processed(rest).get("input_size") or 224 if prefix == "transformers" else 224


def pretrained(name: str) -> Pretrained:
    """The published weights of a timm, torchvision or transformers model, or a folder that transformers wrote.

    Raises UsageError: library absent, model unknown, no network to fetch it, weights that are not there, or a file:
    name, which has no weights.
    """
    prefix, _, rest = name.partition(":")
    if prefix == "file":
        raise UsageError(f"'{name}' has no weights of its own", todo="give a checkpoint")
    library = _library(prefix)
    try:
        if prefix == "timm":
            rest, settings = split(rest)
            model: Any = _module(library.create_model(rest, pretrained=True, **settings), name).eval()
            facts = library.data.resolve_model_data_config(model)
            size, fed = side(facts["input_size"]), (_three(facts["mean"]), _three(facts["std"]))
            return Pretrained(model, model.num_classes, _timm_names(library, model), *fed, size)
        if prefix == "torchvision":
            weights = library.models.get_model_weights(rest).DEFAULT
            model = _module(library.models.get_model(rest, weights=weights), name).eval()
            shown, classes = weights.transforms(), unique(weights.meta["categories"])
            fed = (_three(shown.mean), _three(shown.std))
            return Pretrained(model, len(classes), classes, *fed, side(shown.crop_size))
        return _transformers(library, name, rest)
    except (ValueError, RuntimeError, OSError, TypeError) as error:
        todo = "check the name, or give a local checkpoint"
        raise UsageError(f"cannot load '{name}'", first_line(error), todo) from error


def _transformers(library: ModuleType, name: str, rest: str) -> Pretrained:
    loaded = library.AutoModelForImageClassification.from_pretrained(rest, output_loading_info=True, dtype="float32")
    model: Any = _module(loaded[0], name).eval()
    if fresh := sorted({*loaded[1]["missing_keys"], *(key for key, *_ in loaded[1]["mismatched_keys"])}):
        what = f"'{name}' has no weights for {len(fresh)} layers, e.g. {fresh[0]}"
        raise UsageError(what, "they would be random: it is no trained classifier", "give one with its head")
    labels = model.config.id2label
    names = tuple(str(labels[index]) for index in sorted(labels))
    nameless = all(text == f"LABEL_{index}" for index, text in enumerate(names))
    facts = processed(rest)
    fed = (facts.get("mean"), facts.get("std"), facts.get("input_size"))
    return Pretrained(Logits(model, "logits").eval(), len(names), () if nameless else unique(names), *fed)


def timm_folder(folder: Path, config: Mapping[str, Any]) -> tuple[nn.Module, str, Pretrained]:
    """A folder that timm wrote (save_for_hf, push_to_hf_hub): the network without its weights, the name that `build`
    takes, and what it says.

    config: its config.json. Raises UsageError as `build`.
    """
    facts = config.get("pretrained_cfg") or config
    classes = int(config.get("num_classes") or facts["num_classes"])
    library, name = _library("timm"), str(config["architecture"])
    settings = {key: value for key, value in (config.get("model_args") or {}).items() if key != "num_classes"}
    try:
        model: Any = library.create_model(name, num_classes=classes, **settings)
        # pretrained_cfg keeps the side of the weights that a training began with, unless timm was told another
        size = settings.get("img_size") or config.get("input_size") or facts["input_size"]
        fed = (_three(facts["mean"]), _three(facts["std"]), side(size))
    except (ValueError, RuntimeError, OSError, TypeError, KeyError) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"cannot build what {folder} describes", why, "give a folder as timm writes it") from error
    names = config.get("label_names") or facts.get("label_names") or ()
    words = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    return model, f"timm:{name}({words})" if words else f"timm:{name}", Pretrained(model, classes, unique(names), *fed)


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """Names as they are, with their number behind where several classes share one ("crane 134")."""
    words = tuple(map(str, names))
    return tuple(word if words.count(word) == 1 else f"{word} {index}" for index, word in enumerate(words))


def _timm_names(library: ModuleType, model: Any) -> tuple[str, ...]:
    """ImageNet's first word for every class; () for models of other classes."""
    if (subset := library.data.infer_imagenet_subset(model)) is None:
        return ()
    return unique(text.split(", ")[0] for text in library.data.ImageNetInfo(subset).label_descriptions())


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


def processed(rest: str) -> dict[str, Any]:
    """mean, std and input_size that the preprocessor_config.json of a transformers model tells, those that it does.

    Read as data, since the processor classes want torchvision. Raises UsageError for steps that are not done here.
    """
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    try:
        config: dict[str, Any] = get_image_processor_config(rest)
        if config.get("do_rescale") is False or config.get("rescale_offset"):
            why = "its preprocessor_config.json asks for pixels that are not rescaled to 0..1"
            raise UsageError(f"'transformers:{rest}' is fed in another way", why, "give mean, std and input size")
        # (255 f x - mean) / std, of pixels x in 0..1, where f is not 1/255
        scale = 255 * float(config.get("rescale_factor", 1 / 255))
        facts: dict[str, Any] = {}
        if config.get("do_normalize") is False:
            facts = {"mean": (0.0,) * 3, "std": (1 / scale,) * 3}
        elif "image_mean" in config and "image_std" in config:
            facts = {"mean": _scaled(config["image_mean"], scale), "std": _scaled(config["image_std"], scale)}
        cropped = config.get("do_center_crop") and config.get("crop_size")
        if size := cropped or config.get("size"):
            facts["input_size"] = side(size)
        return facts
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise UsageError(f"cannot load 'transformers:{rest}'", first_line(error)) from error


def side(size: Any) -> int:
    """One side in pixels of what says it: a number, (h, w), (3, h, w), or transformers' {height, width} or
    {shortest_edge}. Raises ValueError for images that are not square, TypeError for none of these."""
    if isinstance(size, Mapping):
        size = [size[key] for key in (("shortest_edge",) if "shortest_edge" in size else ("height", "width"))]
    sides = [size] if isinstance(size, int) and not isinstance(size, bool) else list(size)[-2:]
    if not sides or any(not isinstance(one, int) or one < 1 for one in sides):
        raise TypeError(f"{size!r} is no size")
    if sides[0] != sides[-1]:
        raise ValueError(f"images of {' x '.join(map(str, sides))} are not square")
    return int(sides[0])


def _scaled(values: Any, scale: float) -> Channels:
    red, green, blue = (value / scale for value in _three(values))
    return (red, green, blue) if abs(scale - 1) > 1e-6 else _three(values)


def _three(values: Any) -> Channels:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _names(values: Any) -> tuple[str, ...]:
    if isinstance(values, str) or not all(isinstance(name, str) for name in values):
        raise TypeError
    return tuple(values)


_READ: dict[str, Callable[[Any], Any]] = {"input_size": side, "mean": _three, "std": _three, "class_names": _names}
