"""Weights by name into a network, whatever wrappers have put before or between the names."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from dfkd.errors import UsageError
from dfkd.teachers.trial import Logits

WRAPPERS = ("module", "_orig_mod")  # DataParallel's and DDP's, and torch.compile's


def fit_weights(module: nn.Module, weights: Mapping[str, Tensor], file: Path, name: str, classes: int) -> None:
    """Fill a network and put it in evaluation mode: every weight that it has is found, and every one given is used.

    weights: by the network's own names, or all behind one prefix, whichever it is (`module.`, `_orig_mod.`, `model.`,
    in any order), as wrappers leave them; what lies outside of that prefix (a metric, a loss) is no part of the
    network. WRAPPERS may also stand between names. num_batches_tracked may be absent: it acts on nothing.
    Raises UsageError, which names what is absent, unknown or of another shape; and for several networks that all fit.
    """
    inner = module.model if isinstance(module, Logits) else module
    own = inner.state_dict()
    for given in (weights, _unwrapped(weights)):
        fitting = [prefix for prefix in _prefixes(own, given) if not _misfit(own, given, prefix)]
        if len(fitting) > 1 and "" not in fitting:
            why = f"their weights begin with {' and '.join(fitting)}"
            raise UsageError(f"{file} holds several networks that fit {name}", why, "save the state dict of one")
        if fitting:
            prefix = fitting[0]
            found = {key: given[prefix + key] for key in own if prefix + key in given}
            inner.load_state_dict({**own, **found}, strict=True)
            module.eval()
            return
    nearest = max(_prefixes(own, weights), key=lambda prefix: sum(prefix + key in weights for key in own))
    what = f"{file} does not fit {name} with {classes} classes"
    raise UsageError(what, _misfit(own, weights, nearest), "check the architecture and the class names")


def _unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the names of wrappers, as in features.module.0.weight; two weights of one name then fit nothing."""
    found = {".".join(part for part in key.split(".") if part not in WRAPPERS): value for key, value in weights.items()}
    return found if len(found) == len(weights) else {}


def _prefixes(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """What may stand before the network's names: nothing, or whatever leads to the shortest of them."""
    first = min((key for key in own if not _counts(key)), key=len, default="")
    return ["", *sorted(key.removesuffix(first) for key in weights if key.endswith("." + first))]


def _misfit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], prefix: str) -> str:
    """How the weights behind a prefix differ from those of the network; "" where they do not."""
    given = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    kinds = {"absent": own.keys() - given.keys(), "unknown": given.keys() - own.keys()}
    differing = {kind: sorted(key for key in keys if not _counts(key)) for kind, keys in kinds.items()}
    facts = [f"{len(keys)} {kind}, e.g. {keys[0]}" for kind, keys in differing.items() if keys]
    shapes = [key for key in own if key in given and own[key].shape != given[key].shape]
    facts += [f"{key} is {tuple(given[key].shape)}, wanted {tuple(own[key].shape)}" for key in shapes[:2]]
    return "; ".join(facts)


def _counts(key: str) -> bool:
    """Whether an entry counts steps: of BatchNorm, or of the networks in an average (SWA)."""
    return key.endswith("num_batches_tracked") or key.rpartition(".")[2] == "n_averaged"
