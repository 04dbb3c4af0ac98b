"""The exponential moving average of a student's weights."""

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """A network whose weights follow another's: w <- d w + (1 - d) w', d = min(decay, (1 + n) / (10 + n)) after n
    updates. The ramp keeps the untrained weights of the beginning from lingering in the average of a short run.
    Buffers, such as BatchNorm's statistics, are the other's own.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay = copy.deepcopy(network), decay

    @torch.no_grad()
    def follow(self, network: nn.Module, updates: int) -> None:
        """Take up the weights of the n-th update."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        follow = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        follow(list(self.network.parameters()), list(network.parameters()), updates)
        self._take_buffers(network)

    @torch.no_grad()
    def follow_if(self, network: nn.Module, taken: Tensor, updates: Tensor) -> None:
        """The same where ``taken`` (bool []) says that there was an update, of which this is the n-th; without looking
        at either, which are on the device."""
        decay = torch.clamp((1.0 + updates) / (10.0 + updates), max=self.decay)
        weight = torch.where(taken, 1 - decay, 0.0)
        for mine, theirs in zip(self.network.parameters(), network.parameters(), strict=True):
            mine.lerp_(theirs, weight.to(mine.dtype))
        self._take_buffers(network)

    def _take_buffers(self, network: nn.Module) -> None:
        for mine, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)
