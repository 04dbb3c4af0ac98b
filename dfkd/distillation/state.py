"""The state of a run between two steps."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dfkd.distillation.settings import DistillSettings
from dfkd.resume import write_checkpoint


class State:
    """Student, optimizer and counters after ``step`` steps; everything random follows from the step itself."""

    def __init__(self, student: nn.Module, settings: DistillSettings, device: torch.device) -> None:
        self.student = student
        self.optimizer = torch.optim.SGD(
            student.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
        self.average = copy.deepcopy(student) if settings.ema else None
        self.decay = settings.ema
        self.step = 0
        self.seconds = 0.0
        self.best_step = 0
        # Of held_out.score; below any that can occur.
        self.best = self.last = (-1.0, 0.0)

    @property
    def result(self) -> nn.Module:
        """The network that is judged and saved: the average where there is one."""
        return self.student if self.average is None else self.average

    def update(self, loss: Tensor, lr: float) -> None:
        """One step of SGD on the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.average is not None:
            self._follow(self.average)

    def save(self, out: Path, identity: Mapping[str, Any]) -> None:
        content = {
            "student": self.student.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "best_step": self.best_step,
            "best": self.best,
            "last": self.last,
        }
        write_checkpoint(out, identity, content)

    def load(self, content: Mapping[str, Any]) -> None:
        self.student.load_state_dict(content["student"])
        if self.average is not None:
            self.average.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.step, self.seconds = content["step"], content["seconds"]
        self.best_step, self.best, self.last = content["best_step"], content["best"], content["last"]

    def _follow(self, average: nn.Module) -> None:
        # The ramp keeps the untrained weights of the beginning from lingering in the average of a short run.
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            follow = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            follow(list(average.parameters()), list(self.student.parameters()), self.step)
            for mine, theirs in zip(average.buffers(), self.student.buffers(), strict=True):
                mine.copy_(theirs)
