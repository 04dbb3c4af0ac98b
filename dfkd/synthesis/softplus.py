"""A teacher whose ReLUs have the gradient of softplus: smoother, and not 0 where a unit is off.

    forward   y = max(x, 0), as it is          backward   dL/dx = sigmoid(beta x) dL/dy

Softplus log(1 + e^(beta x)) / beta has that slope. EluCD (arXiv 2310.11311) has it in the forward pass as well; here
logits and the statistics of BatchNorm layers, which are losses, stay those of the teacher.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfkd.errors import UsageError
from dfkd.teachers import Classifier

_RELUS = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


class _SoftRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float) -> Tensor:
        ctx.save_for_backward(torch.sigmoid(beta * x))
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None


class _SoftRelus(TorchFunctionMode):
    """ReLUs of modules and functions alike, replaced while a network runs, and counted."""

    def __init__(self, beta: float) -> None:
        self.beta, self.found = beta, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _RELUS:
            return func(*args, **(kwargs or {}))
        self.found += 1
        relu: Callable[[Tensor, float], Tensor] = _SoftRelu.apply
        return relu(args[0] if args else kwargs["input"], self.beta)


class Softened(nn.Module):
    """A network with the gradient of softplus at its ReLUs: images [B, 3, H, W] -> its own logits [B, C].

    beta: of softplus, above 0.
    """

    untraceable = "its ReLUs pass the gradient of softplus"  # torch.fx would write them down as they are

    def __init__(self, network: nn.Module, beta: float) -> None:
        super().__init__()
        self.network, self.beta = network, beta

    def forward(self, images: Tensor) -> Tensor:
        with _SoftRelus(self.beta):
            logits: Tensor = self.network(images)
        return logits


@torch.no_grad()
def softened(teacher: Classifier, beta: float) -> Classifier:
    """The teacher, whose network is shared, with the gradient of softplus of this beta at its ReLUs; 0: as it is.

    Raises UsageError: it has no ReLU, or one that changes its input in place without handing it on.
    """
    if not beta:
        return teacher
    images = torch.rand(2, 3, teacher.input_size, teacher.input_size, generator=torch.Generator().manual_seed(0))
    dtype = next((weight.dtype for weight in teacher.parameters() if weight.is_floating_point()), torch.float32)
    images = images.to(teacher.device, dtype)
    with (counting := _SoftRelus(beta)):
        found = teacher.logits(images)
    what = f"--softplus-beta {beta:g} with the teacher {teacher.architecture}"
    if not counting.found:
        raise UsageError(what, "it has no ReLU", "leave it out: the gradient of other activations is smooth")
    if not torch.equal(found, teacher.logits(images)):
        raise UsageError(what, "a ReLU of it changes its input in place, and its result is not used", "leave it out")
    return teacher.replace(module=Softened(teacher.module, beta))
