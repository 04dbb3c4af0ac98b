"""One step of distillation: both networks, the loss, its gradient, SGD."""

import torch
from torch import Tensor

from dfkd.training.checks import AMP_DTYPES
from dfkd.training.compiled import GRAPHS, Network, compiled
from dfkd.training.consistency import Compared, Consistency
from dfkd.training.cuda_graph import Captured
from dfkd.training.losses import distillation_loss
from dfkd.training.settings import DistillSettings
from dfkd.training.state import State
from dfkd.training.world import World


class Step:
    """The networks as they are called in training: compiled, captured, shared between processes, as settings say.

    rows: of a batch of this process; kernels: "torch" or "triton"; maps: what mSARC compares, None without it.
    """

    def __init__(
        self,
        teacher: torch.nn.Module,
        state: State,
        settings: DistillSettings,
        world: World,
        rows: int,
        kernels: str,
        maps: Compared | None = None,
    ) -> None:
        self.settings, self.state, self.device, self.kernels = settings, state, world.device, kernels
        self._teacher: Network = compiled(teacher, settings.compile, rows)
        self._student: Network = compiled(world.shared(state.student), settings.compile, rows)
        self._msarc = Consistency(teacher, state.student, maps, settings.msarc_weight) if maps else None
        self._descent = Captured(self._descend, rows) if settings.cuda_graph else self._descend

    def __call__(self, images: Tensor, labels: Tensor, wanted: Tensor | None, lr: float, share: float = 1.0) -> Tensor:
        """Train on a batch; returns its loss, a scalar on the device.

        images: in the networks' form; wanted: the teacher's logits where they are known. share: what its loss counts
        for, 1 where all processes have as many images.
        """
        self.state.set_rate(lr)
        self._share = share
        if self.settings.compile in GRAPHS:
            # The teacher's answer is to outlive the student's call.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        loss = self._descent(images, labels, wanted)
        self.state.advance()
        return loss

    def _descend(self, images: Tensor, labels: Tensor, wanted: Tensor | None) -> Tensor:
        loss = self._loss(images, labels, wanted)
        if self._share != 1:
            loss = self._share * loss
        self.state.descend(loss)
        return loss.detach()

    def _loss(self, images: Tensor, labels: Tensor, wanted: Tensor | None) -> Tensor:
        settings, seen = self.settings, None
        with torch.autocast(self.device.type, AMP_DTYPES[settings.amp], enabled=settings.amp != "off"):
            if self._msarc is not None:
                seen = self._msarc.look(self._teacher, self._student, images)
                wanted, answers = seen.teacher, seen.student
            else:
                if wanted is None:
                    with torch.no_grad():
                        wanted = self._teacher(images)
                answers = self._student(images)
        loss = distillation_loss(answers, wanted, settings.temperature, labels, settings.ce_weight, self.kernels)
        return loss if self._msarc is None or seen is None else loss + self._msarc.loss(seen)
