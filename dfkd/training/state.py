"""The state of a run between two steps."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from dfkd.training.average import Average
from dfkd.training.settings import DistillSettings
from dfkd.training.resume import write_checkpoint


class State:
    """Student, optimizer and counters after ``step`` steps; everything random follows from the step itself.

    In fp16 a step whose scaled gradients are not finite is skipped: the weights stay, the scale is halved. ``step``
    counts it, since its images were shown and the learning rate follows the place in the run; the average of the
    weights does not.

    skipped: how many were, int64 [] on the device; norm: of the gradient before clipping, [] on the device.
    """

    def __init__(self, student: nn.Module, settings: DistillSettings, device: torch.device) -> None:
        self.student, self.clip_norm = student, settings.clip_norm
        self._parameters = [p for p in student.parameters() if p.requires_grad]
        fused = device.type == "cuda"
        # A captured step (--cuda-graph) reads its rate from the device.
        self._rate = torch.tensor(settings.lr, device=device) if settings.cuda_graph else None
        self.optimizer = torch.optim.SGD(
            self._parameters,
            lr=settings.lr if self._rate is None else self._rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=fused or None,  # on a GPU: it skips a step without asking the device
        )
        if fused and settings.momentum:
            # A first step that is skipped would leave behind what it allocated for the momentum.
            for p in self._parameters:
                self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._passed = torch.ones((), dtype=torch.bool, device=device)
        self.norm: Tensor | None = None
        self.average = Average(student, settings.ema) if settings.ema else None
        self.step = 0
        self.seconds = 0.0
        self.best_step = 0
        # Of held_out.score; below any that can occur.
        self.best = self.last = (-1.0, 0.0)

    @property
    def result(self) -> nn.Module:
        """The network that is judged and saved: the average where there is one."""
        return self.student if self.average is None else self.average.network

    def set_rate(self, lr: float) -> None:
        """The learning rate of the next step."""
        if self._rate is not None:
            self._rate.fill_(lr)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def descend(self, loss: Tensor) -> None:
        """The gradient of the loss, and SGD's step along it; on a GPU without waiting for it."""
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
        if self.average is None:
            return
        if self.scaler.is_enabled():
            self.average.follow_if(self.student, self._passed, self.step - self.skipped)
        else:
            self.average.follow(self.student, self.step)

    def measured(self) -> dict[str, float]:
        """What else the log tells of the last step; reading it waits for the device."""
        told = {} if self.norm is None else {"gradient_norm": float(self.norm)}
        if self.scaler.is_enabled():
            told |= {"skipped": int(self.skipped), "loss_scale": self.scaler.get_scale()}
        return told

    def save(self, out: Path, identity: Mapping[str, Any], **more: Any) -> None:
        """Replace the checkpoint; ``more`` is kept beside the state."""
        content = {
            "student": self.student.state_dict(),
            "average": None if self.average is None else self.average.network.state_dict(),
            "momentum": [self.optimizer.state[p].get("momentum_buffer") for p in self._parameters],
            "scaler": self.scaler.state_dict(),
            "skipped": int(self.skipped),
            "step": self.step,
            "seconds": self.seconds,
            "best_step": self.best_step,
            "best": self.best,
            "last": self.last,
        }
        write_checkpoint(out, identity, {**content, **more})

    def load(self, content: Mapping[str, Any]) -> None:
        self.student.load_state_dict(content["student"])
        if self.average is not None:
            self.average.network.load_state_dict(content["average"])
        # Not by its own state_dict, which would bring back how it was computed too.
        for p, momentum in zip(self._parameters, content["momentum"], strict=True):
            if momentum is not None:
                self.optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(momentum)
        self.scaler.load_state_dict(content["scaler"])
        self.skipped.fill_(content["skipped"])
        self.step, self.seconds = content["step"], content["seconds"]
        self.best_step, self.best, self.last = content["best_step"], content["best"], content["last"]
