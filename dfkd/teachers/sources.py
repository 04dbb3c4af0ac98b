"""Where a classifier comes from, known by its content: each source gives a filled network and how it is fed and read.

a folder of ours        config.json with `class_names`, and model.safetensors
a folder of timm        config.json with `architecture` and `pretrained_cfg` (save_for_hf, push_to_hf_hub)
a folder of transformers   config.json with `id2label` or `model_type`, and preprocessor_config.json
a name                  timm:NAME, torchvision:NAME, transformers:FOLDER_OR_ID, with its published weights
a weight file           of an architecture that is named beside it

What is given as an option counts first, then what the source says. Nothing is assumed: the image
size of a weight file is that of the zoo's network, what a `file:` network or a transformers id states, or an option.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dfkd.config import RESIZES
from dfkd.errors import UsageError
from dfkd.files import read_object
from dfkd.teachers import adapters, zoo
from dfkd.teachers.adapters import Pretrained
from dfkd.teachers.fitting import fit_weights
from dfkd.teachers.weights import read_weights

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# Classifiers that come with the program, by what stands for their folder. A folder of that name counts first.
EMBEDDED = {"cifar10-mini": Path(__file__).parent / "cifar10-mini"}
_BIN = "pytorch_model.bin"
_SHAPE = {"architecture": str, "class_names": [str], "mean": [float], "std": [float], "input_size": int}
_FLAGS = {"architecture": "teacher", "class_names": "classes", "mean": "teacher-mean", "std": "teacher-std"}
_FLAGS |= {"input_size": "teacher-input-size"}


def read_source(
    source: str | Path, architecture: str | None, given: Mapping[str, Any], fallback: Sequence[str] = ()
) -> dict[str, Any]:
    """The fields of a classifier: module (evaluation mode, CPU), class_names, mean, std, input_size, resize,
    architecture.

    given: class_names, mean, std, input_size and resize, each None where the source is to say it. fallback: class names
    for a source that has none.
    Raises UsageError: no such source, a part that nothing states, or an architecture, names or weights that do not fit.
    """
    if isinstance(source, str) and adapters.handles(source):
        found = adapters.pretrained(source)
        return _joined(found, source, source, given, fallback)
    path = located(source)
    _check_path(path)
    if (config := config_of(path)) is None:
        return _bare(path, architecture, given, fallback)
    kind, facts = _kind(config)
    if kind == "dfkd":
        return _ours(config, path, architecture, given)
    named = f"transformers:{config.parent}" if kind == "transformers" else f"timm:{facts['architecture']}"
    if architecture is not None and architecture.partition("(")[0] != named:
        raise UsageError(f"{path} holds a {named}, not a {architecture}", todo="leave the name out or correct it")
    if kind == "transformers":
        return _joined(adapters.pretrained(named), named, str(path), given, fallback)
    module, named, found = adapters.timm_folder(config.parent, facts)
    file = config.parent / WEIGHTS
    file = file if file.exists() else file.with_name(_BIN)
    fit_weights(module, read_weights(file), file, named, found.classes)
    return _joined(found, named, str(path), given, fallback)


def located(checkpoint: str | Path) -> Path:
    """A checkpoint's path, or the folder of the classifier that comes with the program by that name."""
    path = Path(checkpoint)
    return path if path.exists() else EMBEDDED.get(str(checkpoint), path)


def config_of(checkpoint: Path) -> Path | None:
    """config.json of a folder, or beside the weight file that such a folder holds; else None."""
    if checkpoint.is_dir():
        return checkpoint / CONFIG
    beside = checkpoint.parent / CONFIG
    return beside if checkpoint.name in (WEIGHTS, _BIN) and beside.exists() else None


def own_names(checkpoint: Path | None) -> tuple[str, ...] | None:
    """The class names of a folder that dfkd wrote, or its weight file; None for another source."""
    path = None if checkpoint is None else located(checkpoint)
    config = config_of(path) if path is not None and path.exists() else None
    if config is None or not config.exists() or _kind(config)[0] != "dfkd":
        return None
    return tuple(read_object(config, _SHAPE, _TODO, needed=_SHAPE)["class_names"])


_TODO = "give a folder that dfkd, timm or transformers wrote"


def _kind(config: Path) -> tuple[str, dict[str, Any]]:
    """Who wrote a config.json, and what it holds."""
    facts = read_object(config, {}, _TODO)
    if "class_names" in facts:
        return "dfkd", facts
    if "id2label" in facts or "model_type" in facts:
        return "transformers", facts
    if "architecture" in facts and ("pretrained_cfg" in facts or "num_features" in facts):
        return "timm", read_object(config, {"architecture": str, "num_classes": int}, _TODO, ("architecture",))
    return "dfkd", facts


def _check_path(checkpoint: Path) -> None:
    if not checkpoint.exists():
        if str(checkpoint) in zoo.names():
            raise UsageError(f"'{checkpoint}' has no weights of its own", todo="give a checkpoint beside the name")
        todo = f"give a folder, a .safetensors, .pth or .pt file, timm:NAME, or {', '.join(EMBEDDED)}"
        raise UsageError(f"no checkpoint {checkpoint}", todo=todo)
    if not checkpoint.is_dir() or (checkpoint / CONFIG).exists():
        return
    for part in ("last", "student/last"):
        if (checkpoint / part / CONFIG).exists():
            raise UsageError(f"{checkpoint} is a run's folder", "its network lies deeper", f"give {checkpoint / part}")
    files = sorted(file.name for file in checkpoint.glob("*") if file.suffix.lower() in (".pth", ".pt", ".safetensors"))
    todo = f"give {checkpoint / files[0]} and say what it is" if files else _TODO
    raise UsageError(f"{checkpoint} has no {CONFIG}", "it says what the weights are", todo)


def _ours(config: Path, path: Path, architecture: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    facts = read_object(config, _SHAPE | {"resize": str}, _TODO, needed=_SHAPE)
    kept, named = facts["architecture"], architecture or facts["architecture"]
    moved = named.startswith("file:") and kept.startswith("file:")  # the same file may lie elsewhere now
    if kept not in ("", named) and not moved:
        raise UsageError(f"{path} holds a {kept}, not a {named}", todo="leave the name out or correct it")
    if not named:
        why = "it was saved from a module without an architecture's name"
        raise UsageError(f"{path} cannot be built", why, "give file:PATH.py:FUNCTION as the architecture")
    module = _filled(named, len(facts["class_names"]), config.parent / WEIGHTS)
    fed = (facts["mean"], facts["std"], facts["input_size"], facts.get("resize"))
    found = Pretrained(module, len(facts["class_names"]), tuple(facts["class_names"]), *fed)
    return _joined(found, named, str(path), given, ())


def _bare(file: Path, architecture: str | None, given: Mapping[str, Any], fallback: Sequence[str]) -> dict[str, Any]:
    """A weight file alone, whose network is named; a `file:` network or a transformers id may say how it is fed."""
    named, facts, names = architecture or "", {}, given["class_names"] or tuple(fallback)
    if named.startswith("file:"):
        names = given["class_names"] or adapters.stated(named).get("class_names") or names
        facts = adapters.stated(named, zoo.build(named, len(names) or 1))
    elif named.startswith("transformers:"):
        facts = adapters.processed(named.partition(":")[2])
    elif named in zoo.names():
        facts = {"input_size": zoo.input_size(named)}
    known = {**facts, **{key: value for key, value in given.items() if value is not None}, "architecture": named}
    known["class_names"] = names = tuple(given["class_names"] or facts.get("class_names") or names)
    if absent := [key for key in _SHAPE if not known.get(key)]:
        why = f"missing: {', '.join(key.replace('_', ' ') for key in absent)}"
        raise UsageError(f"{file} alone does not describe a classifier", why, f"give {_flags(absent)}")
    found = Pretrained(
        _filled(named, len(names), file), len(names), names, known["mean"], known["std"], known["input_size"]
    )
    return _joined(found, named, str(file), given, ())


def _joined(
    found: Pretrained, architecture: str, source: str, given: Mapping[str, Any], fallback: Sequence[str]
) -> dict[str, Any]:
    """What the source says, overridden by what is given. Raises UsageError for a part that neither says."""
    if not found.classes:
        raise UsageError(
            f"{source} has no classes", "it is a network without a classifier's head", "give one that has it"
        )
    names = given["class_names"] or (fallback if _names_the_same(found, fallback) else found.class_names or fallback)
    names = tuple(names) or tuple(map(str, range(found.classes)))
    if len(names) != found.classes:
        what = f"{len(names)} class names for a {architecture} of {found.classes} classes"
        raise UsageError(what, "every logit has one name", "give the names of the teacher's classes with --classes")
    if names != found.class_names and sorted(names) == sorted(found.class_names):
        place = next(i for i, pair in enumerate(zip(names, found.class_names, strict=True)) if pair[0] != pair[1])
        why = f"logit {place} is {found.class_names[place]!r} to it, and {names[place]!r} in the given names"
        raise UsageError(f"{source} has these classes in another order", why, "leave the names out")
    fields = {"mean": found.mean, "std": found.std, "input_size": found.input_size}
    fields |= {key: given[key] for key in fields if given[key] is not None}
    if absent := [key for key, value in fields.items() if value is None]:
        why = f"it says nothing of its {', '.join(key.replace('_', ' ') for key in absent)}"
        raise UsageError(f"{source} does not say how it is fed", why, f"give {_flags(absent)}")
    resize = given["resize"] or found.resize or RESIZES[0]
    own = {"module": found.module, "architecture": architecture, "class_names": names, "resize": resize}
    return {**own, **fields}


def _names_the_same(found: Pretrained, fallback: Sequence[str]) -> bool:
    """Whether the images' folders name ImageNet's classes by WordNet ids, whose order is that of the logits."""
    return len(fallback) == found.classes == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in fallback)


def _filled(architecture: str, classes: int, file: Path) -> nn.Module:
    weights = read_weights(file)
    module = zoo.build(architecture, classes)
    fit_weights(module, weights, file, architecture, classes)
    return module


def _flags(keys: Sequence[str]) -> str:
    return ", ".join(f"--{_FLAGS[key]}" for key in keys)
