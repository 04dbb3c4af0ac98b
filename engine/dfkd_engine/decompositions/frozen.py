"""Networks in a graph are frozen: a gradient of their weights is refused."""

from collections.abc import Sequence

from dfkd_engine.errors import EngineError


def refuse_weight_gradients(layer: str, mask: Sequence[bool]) -> None:
    """mask: which gradients are wanted; all but the first are those of weights. Raises EngineError."""
    if any(mask[1:]):
        raise weight_gradient(f"the weights of a {layer}")


def weight_gradient(of: str) -> EngineError:
    why = "weights are frozen in a graph; only gradients of activations can be taken"
    return EngineError(f"a gradient of {of} is asked for", why, "Set requires_grad_(False) on the networks")
