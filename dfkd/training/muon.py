"""Muon: SGD whose updates of the convolutions' filters are made orthogonal; all other parameters take SGD's own step.

    b <- m b + g;  u = g + m b;  w <- w - lr decay w - lr sqrt(max(1, rows / columns)) orthogonal(u)

for the filters as matrices [out, in * height * width] (Jordan, https://kellerjordan.github.io/posts/muon/). torch.optim
has a Muon for matrices alone, which leaves filters of four dimensions and all other parameters to somebody else; as one
optimiser there is one step to scale, to save and to resume.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Of github.com/KellerJordan/Muon: the steepest rise at 0; values end between 0.7 and 1.2, which does as well as 1.
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def filters(network: nn.Module) -> list[Tensor]:
    """The learned filters that Muon takes: of convolutions that are not grouped, in definition order."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d) and layer.groups == 1]
    return [layer.weight for layer in layers if layer.weight.requires_grad]


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of the matrix U S V^T, [m, n]: five iterations of Newton and Schulz, which are odd polynomials.

    In bfloat16 on a GPU, as the source has it; many a CPU is slower in it than in float32.
    """
    a, b, c = QUINTIC
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    x = x / (x.norm() + 1e-7)  # no singular value is above 1
    if tall := len(x) > x.shape[1]:
        x = x.T
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    flat: Tensor = x.T if tall else x
    return flat


class Muon(torch.optim.Optimizer):
    """Groups with `muon` are filters; the others are SGD's. Each parameter's state is its momentum_buffer."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float, nesterov: bool) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step along the gradients; parameters without one stay."""
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group)

    def _move(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        lr, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
        if group["muon"]:
            p.mul_(1 - lr * decay)
        else:
            gradient = gradient.add(p, alpha=decay)
        if momentum:
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffer.mul_(momentum).add_(gradient)
            gradient = gradient.add(buffer, alpha=momentum) if group["nesterov"] else buffer
        if group["muon"]:
            rows, columns = len(p), p[0].numel()
            gradient = orthogonal(gradient.reshape(rows, columns)).reshape(p.shape)
            lr *= max(1, rows / columns) ** 0.5
        p.add_(gradient, alpha=-lr)
