"""Classifiers on disk: a folder of model.safetensors and config.json, and what others publish.

config.json: architecture, num_classes, class_names, input_size, mean, std, and whatever the writer adds.
"""

import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dfkd import teachers
from dfkd.errors import UsageError
from dfkd.files import replace_file, replace_text
from dfkd.teachers import adapters
from dfkd.teachers.classifier import Classifier

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def save(folder: Path, classifier: Classifier, extra: Mapping[str, Any] | None = None) -> None:
    """Write folder/model.safetensors and folder/config.json, each beside its name and then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **(extra or {}),
        "architecture": classifier.architecture,
        "num_classes": len(classifier.class_names),
        "class_names": classifier.class_names,
        "input_size": classifier.input_size,
        "mean": classifier.mean,
        "std": classifier.std,
    }
    # contiguous(): safetensors keeps no strides, and training leaves weights channels-last.
    weights = {key: value.detach().cpu().contiguous() for key, value in classifier.module.state_dict().items()}
    content = safetensors.torch.save(weights)
    replace_file(folder / WEIGHTS, lambda file: file.write(content))
    replace_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(
    name: str | None,
    checkpoint: Path | None,
    class_names: tuple[str, ...] | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    input_size: int | None = None,
) -> Classifier:
    """A classifier in evaluation mode, on the CPU, every weight found and used.

    checkpoint: a folder of save(), its model.safetensors, a bare .safetensors file, or a .pth / .pt file (a state
    dict, or a dict that holds one as `state_dict`; keys may start with `module.`). Files other than save()'s need
    name, class_names, mean and std. Without a checkpoint, name is a pretrained `timm:`, `torchvision:` or
    `transformers:` model. The other arguments override what the folder or the model says.

    Raises UsageError: something of that is missing, or name, class count or any weight does not fit.
    """
    if checkpoint is None:
        if name is None:
            raise UsageError("no classifier given", todo="give a checkpoint folder, or a name and a checkpoint file")
        teachers.check(name)
        if not adapters.handles(name):
            raise UsageError(f"'{name}' has no weights of its own", todo="give a checkpoint")
        return _override(adapters.pretrained(name), class_names, mean, std, input_size)
    if not checkpoint.exists():
        raise UsageError(f"no checkpoint {checkpoint}", todo="give a folder or a .safetensors, .pth or .pt file")
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    ours = checkpoint.is_dir() or (checkpoint.name == WEIGHTS and (folder / CONFIG).exists())
    if not ours:
        return _load_file(name, checkpoint, class_names, mean, std, input_size)
    config = _read_config(folder / CONFIG)
    architecture = config["architecture"]
    if name is not None and name != architecture:
        raise UsageError(f"{checkpoint} holds a {architecture}, not a {name}", todo="leave the name out or correct it")
    module = teachers.build(architecture, config["num_classes"])
    names, size = tuple(config["class_names"]), int(config["input_size"])
    classifier = Classifier(module, architecture, names, size, _three(config, "mean"), _three(config, "std"))
    _fill(classifier, _read_weights(folder / WEIGHTS), folder / WEIGHTS)
    return _override(classifier, class_names, mean, std, input_size)


def _load_file(
    name: str | None,
    file: Path,
    class_names: tuple[str, ...] | None,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    input_size: int | None,
) -> Classifier:
    if name is None or class_names is None or mean is None or std is None:
        absent = [
            label
            for label, value in (("architecture", name), ("class names", class_names), ("mean", mean), ("std", std))
            if value is None
        ]
        raise UsageError(
            f"{file} alone does not describe a classifier", f"missing: {', '.join(absent)}", "give them as options"
        )
    module = teachers.build(name, len(class_names))
    size = teachers.input_size(name) if input_size is None else input_size
    classifier = Classifier(module, name, class_names, size, mean, std)
    _fill(classifier, _read_weights(file), file)
    return classifier


def _fill(classifier: Classifier, weights: Mapping[str, Tensor], file: Path) -> None:
    own = classifier.module.state_dict()
    absent = sorted(set(own) - set(weights))
    unknown = sorted(set(weights) - set(own))
    shapes = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if absent or unknown or shapes:
        kinds = {"absent": absent, "unknown": unknown}
        facts = [f"{len(keys)} {kind}, e.g. {keys[0]}" for kind, keys in kinds.items() if keys]
        facts += [f"{key} is {tuple(weights[key].shape)}, wanted {tuple(own[key].shape)}" for key in shapes[:2]]
        what = f"{file} does not fit {classifier.architecture} with {len(classifier.class_names)} classes"
        raise UsageError(what, "; ".join(facts), "check the architecture and the class names")
    classifier.module.load_state_dict(weights, strict=True)
    classifier.module.eval()


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(f"no file {file}", "the checkpoint is incomplete") from error
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"cannot read {file}", reason, "give tensors only: safetensors, or a state dict") from error
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"{file} holds no state dict", todo="save model.state_dict(), or a dict with key state_dict")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"cannot read {file}", str(error), "give a folder that dfkd wrote") from error
    missing = {"architecture", "num_classes", "class_names", "input_size", "mean", "std"} - set(config)
    if missing:
        raise UsageError(f"{file} does not say {', '.join(sorted(missing))}", todo="give a folder that dfkd wrote")
    return config


def _override(
    classifier: Classifier,
    class_names: tuple[str, ...] | None,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    input_size: int | None,
) -> Classifier:
    if class_names is not None and len(class_names) != len(classifier.class_names):
        raise UsageError(
            f"{len(class_names)} class names for a {classifier.architecture} of {len(classifier.class_names)} classes",
            "every logit has one name",
        )
    return replace(
        classifier,
        class_names=classifier.class_names if class_names is None else class_names,
        mean=classifier.mean if mean is None else mean,
        std=classifier.std if std is None else std,
        input_size=classifier.input_size if input_size is None else input_size,
    )


def _three(config: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in config[key])
    return red, green, blue
