"""What a network answers, found out on a few images before any work: logits [B, C], or a reason why not.

Taken as they are meant: logits [B, C, 1, 1]; a tuple, list, dict or ModelOutput with one tensor of that shape, or with
`logits`. Refused: probabilities, answers that are not finite, that change from call to call or with the other images
of the batch, and another number of them than there are class names.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfkd.errors import UsageError
from dfkd.extension import running

ROWS = 4  # images of a trial
TOLERANCE = 0.01  # of the logits' range: half precision, and other kernels for one row, stay within it


class Logits(nn.Module):
    """A network whose answer holds the logits among other things, or as [B, C, 1, 1], as one that answers [B, C].

    key: of the answer's logits, an index or a name; None where it is a tensor.
    """

    def __init__(self, model: nn.Module, key: int | str | None) -> None:
        super().__init__()
        self.model, self.key = model, key

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, h, w] -> logits [B, C]."""
        answer = self.model(images)
        logits: Tensor = answer if self.key is None or isinstance(answer, Tensor) else answer[self.key]
        return logits.flatten(1)


def tried(module: nn.Module, images: Tensor, classes: int, name: str, training: bool = False) -> nn.Module:
    """The network, in Logits where its answer needs it, found to answer `images` with logits.

    images: as the network is fed, [B, 3, side, side] on its device, each of another content, B >= 2. training: it will
    be trained, so a copy is tried in training mode as well. The network's own mode and statistics stay as they are.
    Raises UsageError, which names the network.
    """
    before = [layer.training for layer in module.modules()]
    try:
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            answers, again = (_answer(module.eval(), images, name) for _ in range(2))
            alone = _alone(module, images[:1], name)
            learning = _answer(copy.deepcopy(module).train(), images, f"{name} in training") if training else answers
    finally:
        for layer, mode in zip(module.modules(), before, strict=True):
            layer.training = mode
    key = _place(answers, len(images), classes, name)
    logits, repeated, single = (_logits(one, key) for one in (answers, again, alone))
    _judge(logits, name)
    near = TOLERANCE * float(logits.max() - logits.min()) + 1e-4 * float(logits.abs().max())
    if not torch.allclose(logits, repeated, rtol=0, atol=near):
        raise UsageError(f"{name} answers the same images differently each time", "it draws random numbers", _EVAL)
    if single.shape != logits[:1].shape or not torch.allclose(logits[:1], single, rtol=0, atol=near):
        why = "one image alone is answered otherwise than among others"
        raise UsageError(f"{name} answers an image by the rest of its batch", why, _EVAL)
    if isinstance(answers, Tensor) and not isinstance(learning, Tensor):
        key = _place(learning, len(images), classes, f"{name} in training")
    plain = key is None and isinstance(answers, Tensor) and answers.ndim == 2
    return module if plain else Logits(module, key)


_EVAL = "use evaluation mode in all of its layers: no statistics of the batch, no dropout"
_ONE = "give a network that answers with its logits alone"


@torch.no_grad()
def _answer(module: nn.Module, images: Tensor, name: str) -> Any:
    side = images.shape[-1]
    with running(f"{name}, given {len(images)} images of {side} x {side},"):
        return module(images)


def _alone(module: nn.Module, image: Tensor, name: str) -> Any:
    """The answer to one image, where a batch was answered."""
    try:
        return _answer(module, image, name)
    except UsageError as error:
        raise UsageError(f"{name} answers an image by the rest of its batch", error.why, _EVAL) from error


def _place(answer: Any, rows: int, classes: int, name: str) -> int | str | None:
    """Where the logits are in an answer: None for a tensor, else the index or name of the part that is meant."""
    if isinstance(answer, Tensor):
        _check_shape(answer, rows, classes, name)
        return None
    if isinstance(answer, Mapping):
        parts: dict[int | str, Any] = dict(answer)
    elif isinstance(answer, tuple | list):
        parts = dict(enumerate(answer))
        if "logits" in (fields := getattr(answer, "_fields", ())):
            return _named(parts, fields.index("logits"), rows, classes, name)
    else:
        raise UsageError(f"{name} answers with a {type(answer).__name__}", "wanted are logits, a tensor [B, C]", _ONE)
    if "logits" in parts:
        return _named(parts, "logits", rows, classes, name)
    fitting = [key for key, part in parts.items() if isinstance(part, Tensor) and _fits(part, rows, classes)]
    if len(fitting) != 1:
        shapes = ", ".join(f"{key}: {_shown(part)}" for key, part in parts.items())
        many = f"{len(fitting)} of them could" if fitting else "none of them can"
        why = f"{many} be logits of {classes} classes: {shapes}"
        raise UsageError(f"{name} answers with {len(parts)} things", why, _ONE)
    return fitting[0]


def _named(parts: Mapping[int | str, Any], key: int | str, rows: int, classes: int, name: str) -> int | str:
    if not isinstance(parts[key], Tensor):
        raise UsageError(f"{name} answers with logits that are {_shown(parts[key])}", "wanted is a tensor [B, C]", _ONE)
    _check_shape(parts[key], rows, classes, name)
    return key


def _fits(part: Tensor, rows: int, classes: int) -> bool:
    return part.shape[:2] == (rows, classes) and part.shape[2:].numel() == 1 and part.is_floating_point()


def _check_shape(logits: Tensor, rows: int, classes: int, name: str) -> None:
    if _fits(logits, rows, classes):
        return
    shape = list(logits.shape)
    if not logits.is_floating_point():
        raise UsageError(f"{name} answers with {logits.dtype}", "wanted are logits, floating-point numbers", _ONE)
    if logits.ndim < 2 or shape[0] != rows or logits.shape[2:].numel() != 1:
        raise UsageError(f"{name} answers {rows} images with {shape}", "wanted are logits [B, C]", _ONE)
    what, why = f"{name} gives {shape[1]} logits", f"there are {classes} class names"
    raise UsageError(what, why, "name every logit with --classes, in order")


def _logits(answer: Any, key: int | str | None) -> Tensor:
    logits: Tensor = answer if key is None else answer[key]
    return logits.float().flatten(1) if logits.ndim > 1 else logits.float()


def _judge(logits: Tensor, name: str) -> None:
    if not logits.isfinite().all():
        why = "a few random images have NaN or infinite answers"
        raise UsageError(f"{name} gives logits that are not finite", why, "check its weights and what it is fed")
    one = torch.ones(len(logits), device=logits.device)
    if logits.shape[1] > 1 and (logits >= 0).all() and torch.allclose(logits.sum(1), one, rtol=0, atol=1e-3):
        why = "its rows are probabilities that sum to one: the losses would apply a softmax to a softmax"
        raise UsageError(f"{name} ends with a softmax", why, "leave that layer out: logits are wanted")


def _shown(part: Any) -> str:
    return f"a tensor {list(part.shape)}" if isinstance(part, Tensor) else f"a {type(part).__name__}"
