"""What a run leaves: OUT/last and OUT/best, and the numbers that belong to them."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from dfkd.training.held_out import logits_of, score
from dfkd.training.state import State
from dfkd.teachers import checkpoint
from dfkd.teachers.classifier import Classifier


@dataclass(frozen=True)
class DistillResult:
    """student: the last one; best: the best one on the held-out images (the last where none are held out).

    agreement: share of the held-out images on which the student's first choice is the teacher's, None without any;
    images: how many were shown, in ``steps`` batches, ``skipped`` of which changed nothing (fp16 alone skips); seconds:
    of training, before and after a resumption.
    """

    student: Classifier
    best: Classifier
    agreement: float | None
    best_agreement: float | None
    best_step: int
    steps: int
    skipped: int
    images: int
    seconds: float


class HeldOut:
    """The check on the held-out images uint8 [N, 3, size, size], against the teacher's answers to them."""

    def __init__(self, images: Tensor, teacher: Classifier, temperature: float) -> None:
        self._images, self._temperature = images, temperature
        self._wanted = logits_of(teacher, images)

    def judge(self, state: State, pupil: Classifier, out: Path) -> dict[str, float]:
        """The student's score; it becomes OUT/best where it is. Leaves the network in evaluation mode."""
        judged = replace(pupil, module=state.result.eval())
        state.last = score(logits_of(judged, self._images), self._wanted, self._temperature)
        if state.last > state.best:
            state.best, state.best_step = state.last, state.step
            checkpoint.save(out / "best", judged, {"step": state.step, "agreement": state.last[0]})
        return {"agreement": state.last[0], "held_out_loss": -state.last[1]}


def finish(state: State, pupil: Classifier, out: Path, held_out: bool, steps: int, images: int) -> DistillResult:
    """Save the last student and read the best one back."""
    last = replace(pupil, module=state.result.eval())
    checkpoint.save(out / "last", last, {"step": state.step})
    if not held_out:
        checkpoint.save(out / "best", last, {"step": state.step})
    best = replace(last, module=copy.deepcopy(last.module))
    device = next(last.module.parameters()).device
    best.module.load_state_dict(load_file(out / "best" / checkpoint.WEIGHTS, device=str(device)))
    return result_of(state, last, best, held_out, steps, images)


def result_of(
    state: State, last: Classifier, best: Classifier, held_out: bool, steps: int, images: int
) -> DistillResult:
    return DistillResult(
        student=last,
        best=best,
        agreement=state.last[0] if held_out else None,
        best_agreement=state.best[0] if held_out else None,
        best_step=state.best_step if held_out else state.step,
        steps=steps,
        skipped=int(state.skipped),
        images=images,
        seconds=round(state.seconds, 3),
    )
