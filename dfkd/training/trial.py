"""A backward pass before the first step: what cannot be trained is found in a second, and not after hours or by DDP."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dfkd.data import Form
from dfkd.errors import UsageError

ONE_VALUE = "Expected more than 1 value per channel"  # torch's words where BatchNorm has no variance to take


def without_gradient(
    network: nn.Module, form: Form, rows: int, inputs: Sequence[Tensor] | None = None
) -> tuple[str, ...]:
    """Names of the parameters that learn and that no gradient of the logits reaches; a copy of the network is tried.

    rows: images of the smallest batch of a process. inputs: what the network takes, if that is not images of the form.
    Raises UsageError where nothing is to be learned, no parameter gets a gradient, or BatchNorm cannot take statistics
    over so few images.
    """
    name = type(network).__name__
    if not any(p.requires_grad for p in network.parameters()):
        why = "it has no parameters, or all of them are frozen"
        raise UsageError(f"{name} has nothing to learn", why, "call requires_grad_(True), or choose another network")
    tried = copy.deepcopy(network).train()
    if inputs is None:
        shape = (min(rows, 2), 3, form.size, form.size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(form.device)
        inputs = (images.contiguous(memory_format=torch.channels_last),)
    with torch.random.fork_rng([form.device] if form.device.type == "cuda" else []):
        try:
            logits = tried(*inputs)
        except ValueError as error:
            if not str(error).startswith(ONE_VALUE):
                raise
            what = f"batches of {rows} image{'s' * (rows > 1)} for {name}"
            why = "BatchNorm of a vector or of maps of 1x1 takes its statistics over two images at least"
            raise UsageError(what, why, "raise --batch-size, give more images, or start fewer processes") from None
        if logits.requires_grad:
            logits.float().square().sum().backward()
    learned = [(key, p.grad is not None) for key, p in tried.named_parameters() if p.requires_grad]
    if not any(reached for _, reached in learned):
        raise UsageError(f"{name} cannot learn", "no gradient of its logits reaches a parameter", "see to its forward")
    return tuple(key for key, reached in learned if not reached)
