"""Whether a network's config can be what its class takes: known keys, values of their types, sizes above 0.

The types are those that diffusers and transformers state themselves: a count that is a text, or a key with a typing
error, would otherwise fail deep inside a network, or leave a default in its place without a word.
"""

import difflib
import inspect
import math
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Union, get_args, get_origin

from dfkd_engine.errors import EngineError, first_line

_ZERO_TOO = ("freq_shift", "downsample_padding", "dual_attention_layers")  # the last one's are numbers of layers
_ABOVE_ZERO = ("scaling_factor", "mid_block_scale_factor", "resnet_out_scale_factor")
_NOT_BELOW_ZERO = ("norm_eps", "dropout")
_NEVER_NULL = ("norm_num_groups", "num_embeds_ada_norm", "layer_norm_eps", "eos_token_id", "initializer_factor")
_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))
_LEVELS = ("block_out_channels", "down_block_types", "up_block_types")  # one entry a level of a network each
_NONE_TOO = {"AutoencoderKL": "layers_per_block"}  # its decoder has one more, and with one width all channels fit
_SHOWN = 200  # characters of a value, in an error
_CORRECT = "correct it, or fetch the prior again"
# What libraries of other versions wrote into the configs of transformers' networks, and nothing follows from.
_TRANSFORMERS_OWN = ("dropout", "output_past", "torch_dtype", "model_type")
_WRITTEN = {"AutoencoderTiny": ("block_out_channels",)}  # what a class writes into its config and does not take


def check_diffusers_config(where: str, network: Any, config: Mapping[str, Any]) -> None:
    """Raise EngineError for a value that a network of diffusers cannot take, naming `where`, key and value.

    network: its class. Warns of keys that it does not know, and refuses one that is nearly the name of an absent one.
    """
    parameters = inspect.signature(network.__init__).parameters
    hints = typing.get_type_hints(network.__init__)
    known = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    written = _WRITTEN.get(network.__name__, ())
    check_keys(where, network.__name__, {key: v for key, v in config.items() if key not in written}, known)
    for key in (key for key in known if key in config):
        none = key == _NONE_TOO.get(network.__name__) and type(config[key]) is int and config[key] == 0
        if not none and (wanted := unfit(key, config[key], hints.get(key, Any), known[key])):
            raise refused(where, key, config[key], f"{network.__name__} wants {wanted}")
    _check_levels(where, config)


def check_transformers_config(where: str, kind: Any, config: Mapping[str, Any]) -> None:
    """Raise EngineError for an entry of a transformers config that its class `kind` cannot take. where: of the file."""
    try:
        kind.from_dict(dict(config))
    except Exception as error:  # a strict dataclass's own errors, and those of its checks
        raise failure(where, config, ValueError(" ".join(str(error).split())), kind.from_dict) from error
    known, hints = vars(kind()), inspect.get_annotations(kind, eval_str=True)
    for key in (key for key in hints if key in known and key in config):
        if wanted := unfit(key, config[key], hints[key], known[key]):
            raise refused(where, key, config[key], f"{kind.__name__} wants {wanted}")
    from transformers import GenerationConfig  # whose settings used to be in these configs too

    own = [*known, *kind.attribute_map]
    others = {*vars(GenerationConfig()), *_TRANSFORMERS_OWN} - {*own}
    check_keys(where, kind.__name__, {key: v for key, v in config.items() if key not in others}, own)


def check_tokenizer_config(where: str, config: Mapping[str, Any]) -> None:
    """Raise EngineError for an entry of a tokenizer's JSON files that it cannot have, naming `where`, key and value."""
    for key, value in config.items():
        written = value.get("content") if isinstance(value, dict) else value or ""
        if key in _TOKENS and not isinstance(written, str):
            raise refused(where, key, value, "it is a text, or an object with the text as its content")
        if key == "model_max_length" and unfit(key, value, int, 1) and not (isinstance(value, float) and value > 1e9):
            raise refused(where, key, value, "it is a number of tokens, more than 0")


def check_keys(where: str, name: str, config: Mapping[str, Any], known: Iterable[str]) -> None:
    """Warn of keys that the class `name` does not know; raise EngineError for a known one's typing error."""
    known = list(known)
    strange = sorted(key for key in config if key not in known and not key.startswith("_"))
    absent = [key for key in known if key not in config]
    for key in strange:
        if near := difflib.get_close_matches(key, absent, 1, 0.85):
            raise refused(where, key, config[key], f"{name} has no such key, and {near[0]} is missing")
    if strange:
        shown = ", ".join(f"{key} = {config[key]!r}" for key in strange)
        warnings.warn(f"{where}: {name} does not know {shown}, and goes without", stacklevel=2)


def unfit(key: str, value: object, hint: Any, default: object) -> str:
    """What is wanted instead of a value, "" where it fits. hint: the type that the class states, default: its own."""
    if value is None and key in _NEVER_NULL:
        return "a number"
    like_default = default is not None and type(value) is type(default) and not isinstance(value, list | tuple)
    if not (like_default or fits(value, hint)):
        return f"{_words(hint)}"
    numbers = value if isinstance(value, list) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if not math.isfinite(number):
            return "finite numbers"
        counted = isinstance(number, int) and _counts(hint) and key not in _ZERO_TOO and not key.endswith("token_id")
        if number <= 0 and (key in _ABOVE_ZERO or counted):
            return "more than 0"
        if number < 0 and key in (*_NOT_BELOW_ZERO, *_ZERO_TOO):
            return "0 or more"
    return ""


def fits(value: object, hint: Any) -> bool:
    """Whether a value of JSON is of a type. Lists stand for tuples, whose length counts where several types are in."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, kind) for kind in inner)
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool | None)  # Stable Diffusion XL's own config has a null for false
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if (origin or hint) in (tuple, list):
        kinds = [kind for kind in inner if kind is not Ellipsis]
        if not isinstance(value, list | tuple) or (len(kinds) > 1 and len(kinds) != len(value)):
            return False
        each = kinds if len(kinds) > 1 else (kinds or [Any]) * len(value)
        return all(fits(item, kind) for item, kind in zip(value, each, strict=True))
    return True  # a type that JSON has no values of, or Any


def refused(where: str, key: str, value: object, why: str) -> EngineError:
    """The error for one key's value."""
    shown = repr(value)
    if len(shown) > _SHOWN:
        shown = f"{shown[:_SHOWN]}..."
    return EngineError(f"{where}: {key} is {shown}", why, _CORRECT)


def failure(
    where: str, config: Mapping[str, Any], error: Exception, make: Callable[[dict[str, Any]], object]
) -> EngineError:
    """The error for a network that its config does not make, or that fails when it is called.

    make: what failed, from a config, with no weights: the key without which it works is named. error: how it failed.
    """
    text = first_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {first_line(error)}"
    if _works(make, dict(config)):  # its shapes fit: what failed is a file, the memory or the device
        todo = "see to the memory and the device, or fetch the prior again"
        return EngineError(where, f"the network could not be loaded or called ({text[:300]})", todo)
    for key, value in config.items():
        if not key.startswith("_") and _works(make, {k: v for k, v in config.items() if k != key}):
            return refused(where, key, value, f"with it no such network works ({text[:300]})")
    return EngineError(where, f"no network works with it ({text[:300]})", _CORRECT)


def make_diffusers(network: Any, config: dict[str, Any]) -> Any:
    """A network of diffusers as its config says, on torch's default device."""
    return network.from_config(config)


def make_transformers(network: Any, config: dict[str, Any]) -> Any:
    """A network of transformers as its config says, on torch's default device."""
    return network(network.config_class.from_dict(config))


def _works(make: Callable[[dict[str, Any]], object], config: dict[str, Any]) -> bool:
    import torch

    try:
        with torch.device("meta"), torch.no_grad():  # shapes alone
            make(config)
    except Exception:  # whichever: it is asked for nothing else
        return False
    return True


def _check_levels(where: str, config: Mapping[str, Any]) -> None:
    """Raise EngineError where lists of levels differ in length, or channels do not fall into groups."""
    levels = {key: config[key] for key in _LEVELS if isinstance(config.get(key), list)}
    counts = {key: len(value) for key, value in levels.items()}
    if len(set(counts.values())) > 1:
        odd = min(counts, key=lambda key: list(counts.values()).count(counts[key]))
        others = ", ".join(f"{key} has {count}" for key, count in counts.items() if key != odd)
        raise refused(where, odd, levels[odd], f"it has {counts[odd]} levels, and {others}")
    groups = config.get("norm_num_groups")
    for width in levels.get("block_out_channels", []) if groups else []:
        if width % groups:
            raise refused(where, "norm_num_groups", groups, f"it does not divide {width} of block_out_channels")


def _counts(hint: Any) -> bool:
    """Whether numbers of a type are counts: whole ones."""
    return hint is int or any(_counts(kind) for kind in get_args(hint))


def _words(hint: Any) -> str:
    """A type as JSON has it."""
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    if hint in names:
        return names[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(kind) for kind in inner))
    kinds = [kind for kind in inner if kind is not Ellipsis]
    if len(kinds) > 1:
        return f"a list of {len(kinds)}: {', '.join(_words(kind) for kind in kinds)}"
    return f"a list of {_words(kinds[0]).replace('a ', '', 1)}s" if kinds and kinds[0] in names else "a list"
