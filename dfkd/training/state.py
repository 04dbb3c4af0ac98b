"""The state of a training between two steps: network, optimiser, average of the weights; and the learning rate."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from dfkd.config import OptimiserConfig, TrainConfig
from dfkd.errors import UsageError
from dfkd.training.muon import Muon, filters

RISE = 0.3  # share of a onecycle run in which the rate rises
FALL = 0.4  # share of a trapezoid run in which it falls


def learning_rate(step: int, total: int, config: OptimiserConfig) -> float:
    """The rate of step 0 <= step < total.

    constant: the highest; multistep: the highest, times gamma from each milestone on; cosine: half a cosine from the
    highest to 0, which begins after the warm-up; onecycle: a straight rise from 1/25 over the first 30 %, then half a
    cosine to 0 (Smith and Topin, arXiv:1708.07120); trapezoid: the highest, and over the last 40 % straight down to 0
    (Haegele et al., arXiv:2405.18392). During the first `warmup` steps it is multiplied by (step + 1) / (warmup + 1).
    """
    peak = config.lr * min(1.0, (step + 1) / (config.warmup + 1))
    if config.schedule == "constant":
        return peak
    if config.schedule == "multistep":
        return peak * config.gamma ** sum(step >= round(part * total) for part in config.milestone_parts())
    if config.schedule == "cosine":
        done = max(0, step - config.warmup) / max(1, total - config.warmup)
        return peak * (1 + math.cos(math.pi * done)) / 2
    done = step / total
    if config.schedule == "trapezoid":
        return peak * min(1.0, (1 - done) / FALL)
    if done < RISE:
        return peak * (0.04 + 0.96 * done / RISE)
    return peak * (1 + math.cos(math.pi * (done - RISE) / (1 - RISE))) / 2


class State:
    """Network, optimiser and counters after `step` steps; everything random follows from the step itself.

    In fp16 a step whose scaled gradients are not finite is skipped: the weights stay, the scale is halved. `step`
    counts it, since its images were shown and the learning rate follows the place in the run; the average of the
    weights does not.

    skipped: how many were, int64 [] on the device; norm: of the gradient before clipping, [] on the device.
    kept: plain JSON values that an evaluation keeps from one check to the next.
    """

    def __init__(self, network: nn.Module, config: TrainConfig, device: torch.device) -> None:
        optimiser, fused = config.optimiser, device.type == "cuda"
        self.network, self.clip_norm = network, optimiser.clip_norm
        groups = parameter_groups(network, optimiser)
        nesterov = optimiser.nesterov and optimiser.momentum > 0
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        # A captured step (--cuda-graph) reads its rate from the device.
        self._rate = torch.tensor(optimiser.lr, device=device) if config.compute.cuda_graph else None
        rate = optimiser.lr if self._rate is None else self._rate
        self.optimizer: torch.optim.Optimizer
        if optimiser.optimiser == "muon":
            self.optimizer = Muon(groups, optimiser.lr, optimiser.momentum, nesterov)
        elif optimiser.optimiser == "adamw":
            self.optimizer = torch.optim.AdamW(
                groups,
                lr=rate,
                betas=(optimiser.momentum, optimiser.beta2),
                fused=fused or None,
                capturable=config.compute.cuda_graph,
            )
        else:
            self.optimizer = torch.optim.SGD(
                groups,
                lr=rate,
                momentum=optimiser.momentum,
                nesterov=nesterov,
                fused=fused or None,  # on a GPU: it skips a step without asking the device
            )
        if fused and optimiser.momentum and optimiser.optimiser == "sgd":
            # A first step that is skipped would leave behind what it allocated for the momentum.
            for p in self._parameters:
                self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.compute.amp == "fp16")
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._passed = torch.ones((), dtype=torch.bool, device=device)
        self.norm: Tensor | None = None
        self.average = Average(network, optimiser.ema) if optimiser.ema else None
        self.step = 0
        self.seconds = 0.0
        self.kept: dict[str, Any] = {}

    @property
    def result(self) -> nn.Module:
        """The network that is judged and saved: the average where there is one."""
        return self.network if self.average is None else self.average.network

    def set_rate(self, lr: float) -> None:
        """The learning rate of the next step."""
        if self._rate is not None:
            self._rate.fill_(lr)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("rate", 1.0)

    def descend(self, loss: Tensor) -> None:
        """The gradient of the loss, and the optimiser's step along it; on a GPU without waiting for it."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        if self.scaler.is_enabled():
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            self._passed = get_total_norm(gradients, math.inf).isfinite()
            self.skipped += ~self._passed
        if self.clip_norm:
            self.norm = clip_grad_norm_(self._parameters, self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def advance(self) -> None:
        """Count the step that was made, and let the average follow."""
        self.step += 1
        if self.average is not None:
            self.average.follow(self.network, self._passed, self.step - self.skipped)

    def measured(self) -> dict[str, float]:
        """What else the log tells of the last step; reading it waits for the device."""
        told = {} if self.norm is None else {"gradient_norm": float(self.norm)}
        if self.scaler.is_enabled():
            told |= {"skipped": int(self.skipped), "loss_scale": self.scaler.get_scale()}
        return told

    def content(self) -> dict[str, Any]:
        """What `load` takes, on the network's device."""
        return {
            "network": learned(self.network),
            "average": None if self.average is None else learned(self.average.network),
            "optimiser": [dict(self.optimizer.state[p]) for p in self._parameters],
            "scaler": self.scaler.state_dict(),
            "skipped": int(self.skipped),
            "step": self.step,
            "seconds": self.seconds,
            "kept": self.kept,
        }

    def load(self, content: Mapping[str, Any]) -> None:
        """Take up what `content` gave, perhaps on another device or computed otherwise."""
        load_learned(self.network, content["network"])
        if self.average is not None:
            load_learned(self.average.network, content["average"])
        # Not by the optimiser's own state_dict, which would bring back how it was computed too.
        on_device = self.optimizer.defaults.get("fused") or self.optimizer.defaults.get("capturable")
        for p, kept in zip(self._parameters, content["optimiser"], strict=True):
            for name, value in kept.items():
                if value is None:  # of SGD without momentum
                    continue
                if value.ndim == 0:  # AdamW's count of steps, which lies beside the host's code unless that is a kernel
                    self.optimizer.state[p][name] = value.clone().to(p.device if on_device else "cpu")
                else:
                    self.optimizer.state[p][name] = torch.empty_like(p).copy_(value)
        self.scaler.load_state_dict(content["scaler"])
        self.skipped.fill_(content["skipped"])
        self.step, self.seconds, self.kept = content["step"], content["seconds"], dict(content["kept"])


def learned(network: nn.Module) -> dict[str, Tensor]:
    """The network's state without the parameters that are frozen, which its source still has."""
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    return {name: value for name, value in network.state_dict().items() if name not in frozen}


def load_learned(network: nn.Module, content: Mapping[str, Tensor]) -> None:
    """Take up what `learned` gave; frozen parameters stay."""
    frozen = {name: p for name, p in network.named_parameters() if not p.requires_grad}
    network.load_state_dict({**frozen, **content})


def parameter_groups(network: nn.Module, config: OptimiserConfig) -> list[dict[str, Any]]:
    """The optimiser's groups, each with its weight_decay: none for biases and norms where weights alone decay.

    Of muon one is of filters, whose learning rate is `rate` times that of the others. Raises UsageError where there are
    no filters.
    """
    learned = [p for p in network.parameters() if p.requires_grad]
    own = filters(network) if config.optimiser == "muon" else []
    if config.optimiser == "muon" and not own:
        why = "it has no convolutions whose filters could be learned"
        raise UsageError(f"--optimiser muon with {type(network).__name__}", why, "use --optimiser sgd")
    taken = set(map(id, own))
    rest = [p for p in learned if id(p) not in taken]
    decaying = [p for p in rest if config.decay == "all" or p.ndim > 1]
    spared = [p for p in rest if config.decay != "all" and p.ndim <= 1]
    groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    if config.optimiser == "muon":
        groups = [{**group, "muon": False} for group in groups]
        rate = config.muon_lr / config.lr
        groups.append({"params": own, "weight_decay": config.weight_decay, "muon": True, "rate": rate})
    return [group for group in groups if group["params"]]


class Average:
    """A network whose weights follow another's: w <- d w + (1 - d) w', d = min(decay, (1 + n) / (10 + n)) after n
    updates. The ramp keeps the untrained weights of the beginning from lingering in the average of a short run.
    Buffers, such as BatchNorm's statistics, are the other's own.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        shared = {id(p): p for p in network.parameters() if not p.requires_grad}  # frozen: one copy is enough
        self.network, self.decay = copy.deepcopy(network, shared), decay

    @torch.no_grad()
    def follow(self, network: nn.Module, taken: Tensor, updates: Tensor) -> None:
        """Take up the weights where `taken` (bool []) says that there was an update, of which this is the n-th.

        Both are on the device, where they stay: nothing waits for them.
        """
        decay = torch.clamp((1 + updates.double()) / (10 + updates.double()), max=self.decay)
        weight = torch.where(taken, 1 - decay, 0.0)
        mine: list[Tensor] = [p for p in self.network.parameters() if p.requires_grad]
        theirs: list[Tensor] = [p for p in network.parameters() if p.requires_grad]
        way = list(torch._foreach_sub(theirs, mine))  # a few launches, however many parameters
        torch._foreach_mul_(way, weight.to(mine[0].dtype))
        torch._foreach_add_(mine, way)
        for own, other in zip(self.network.buffers(), network.buffers(), strict=True):
            own.copy_(other)
