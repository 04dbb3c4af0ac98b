"""Distillation: a student learns a frozen teacher's answers on synthetic images.

OUT/last, OUT/best     the student as model.safetensors + config.json
OUT/checkpoint.pt      the state to resume from
OUT/log.jsonl          losses and checks on the held-out images
"""

import copy
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dfkd.device import resolve_device
from dfkd.distillation.checks import AMP_DTYPES, check
from dfkd.distillation.held_out import logits_of, score, split
from dfkd.distillation.identity import identity
from dfkd.distillation.log import Losses
from dfkd.distillation.losses import distillation_loss
from dfkd.distillation.mixing import mix
from dfkd.distillation.schedule import learning_rate
from dfkd.distillation.settings import EPOCHS, DistillSettings
from dfkd.distillation.state import State
from dfkd.files import folder_lock, make_writable, remove_partials
from dfkd.kernel_choice import choose_kernels
from dfkd.loader import Form, Images, Order, Source, choose, open_source, read_all, steps
from dfkd.log import Log
from dfkd.randomness import derived_seed, seed_global
from dfkd.resume import CHECKPOINT, read_checkpoint
from dfkd.teachers import checkpoint
from dfkd.teachers.classifier import Classifier

LOG_EVERY = 50
CHECKS = 20  # of the held-out images in a run, unless checkpoint_every says otherwise


@dataclass(frozen=True)
class DistillResult:
    """student: the last one; best: the best one on the held-out images (the last where none are held out).

    agreement: share of the held-out images on which the student's first choice is the teacher's, None without any;
    images: how many were shown, in ``steps`` batches; seconds: of training, before and after a resumption.
    """

    student: Classifier
    best: Classifier
    agreement: float | None
    best_agreement: float | None
    best_step: int
    steps: int
    images: int
    seconds: float


def distill(
    data: Images,
    teacher: Classifier,
    student: nn.Module,
    settings: DistillSettings,
    out: Path,
    *,
    architecture: str = "",
    watch: Callable[[int, int], object] = lambda done, total: None,
    say: Callable[[str], object] = lambda text: None,
) -> DistillResult:
    """Train ``student`` in place on the pool ``data`` and leave its checkpoints in ``out``.

    student takes what the teacher takes, normalised images of its input size; architecture is the name that
    dfkd.teachers.build knows it by. A run that was stopped goes on where its last checkpoint was, with the same result
    (bit for bit on a CPU); a finished one returns at once. watch(images shown, images in all) is called after every
    step, say(text) with what a user should know.
    Raises UsageError for classes that disagree, a precision, device or kernels that cannot work, an ``out`` of other
    settings or in use, and a loss that is not finite.
    """
    device = resolve_device(settings.device)
    kernels = choose_kernels(settings.kernels, device)
    check(data, teacher, student, settings, device)
    make_writable(out)
    devices = [device] if device.type == "cuda" else []
    with folder_lock(out), torch.random.fork_rng(devices=devices):
        name = architecture or type(student).__name__
        run = _Run(data, teacher, student, settings, out, name, device, kernels.name)
        if run.state.step < run.order.steps:
            say(f"kernels: {kernels.name} ({kernels.why})")
            run.train(run.loader(say), watch)
        return run.result()


class _Run:
    def __init__(
        self,
        data: Images,
        teacher: Classifier,
        student: nn.Module,
        settings: DistillSettings,
        out: Path,
        architecture: str,
        device: torch.device,
        kernels: str,
    ) -> None:
        remove_partials(out)
        self.data, self.settings, self.out, self.device, self.kernels = data, settings, out, device, kernels
        self.identity = identity(data, teacher, architecture, settings)
        self.teacher = replace(teacher, module=_place(teacher.module, device).eval())
        self.pupil = replace(teacher, module=_place(student, device), architecture=architecture)
        self.rows, self.held = split(data.ids, settings.held_out)
        self.order = Order(settings.seed, len(self.rows), settings.batch_size, run_length(settings, len(self.rows)))
        self.every = settings.checkpoint_every or -(-self.order.steps // CHECKS)
        self.state = State(student, settings, device)
        if not settings.resume:
            _clear(out)
        saved = read_checkpoint(out, self.identity, device)
        if saved is None:
            self.state.save(out, self.identity)  # the initial weights, and whose folder this is
        else:
            self.state.load(saved)

    def loader(self, say: Callable[[str], object]) -> Source:
        settings, teacher = self.settings, self.teacher
        # What autocast would round in front of the first layer may come rounded; what is blended is blended before.
        blended = settings.mix in ("mixup", "both")
        dtype = torch.float32 if blended else AMP_DTYPES[settings.amp]
        form = Form(teacher.input_size, teacher.mean, teacher.std, self.device, dtype)
        choice = choose(settings.loader, len(self.rows), form.size, self.device)
        say(f"loader: {choice.name} ({choice.why})")
        kind, rows, workers = settings.augment, self.order.batch_size, settings.workers
        return open_source(choice, self.data, self.rows, form, kind, rows, workers)

    def train(self, source: Source, watch: Callable[[int, int], object]) -> None:
        settings, order, state, student = self.settings, self.order, self.state, self.pupil.module.train()
        held = read_all(self.data, self.held, self.teacher.input_size) if len(self.held) else None
        held_wanted = None if held is None else logits_of(self.teacher, held)
        parts, dtype = settings.milestone_parts(), AMP_DTYPES[settings.amp]
        losses, started = Losses(), time.perf_counter() - state.seconds
        watch(state.step * order.batch_size, order.length)
        log = Log(self.out / "log.jsonl", "step", state.step)
        for batch in source.batches(steps(order, settings.augment, self.teacher.input_size, state.step)):
            seed_global(derived_seed(settings.seed, "dropout", state.step), self.device)
            assert batch.random is not None  # these steps have their own
            inputs = mix(batch.images, settings.mix, settings.mix_alpha, batch.random)
            with torch.autocast(self.device.type, dtype, enabled=settings.amp != "off"):
                with torch.no_grad():
                    wanted = self.teacher.module(inputs)
                answers = student(inputs)
            loss = distillation_loss(
                answers, wanted, settings.temperature, batch.labels, settings.ce_weight, self.kernels
            )
            lr = learning_rate(state.step, order.steps, settings.lr, settings.schedule, parts, settings.warmup)
            state.update(loss, lr)

            losses.add(state.step, batch.ids, loss)
            due = state.step % self.every == 0 or state.step == order.steps
            if due or state.step % LOG_EVERY == 0:
                log.write(state.step, loss=losses.mean(f"the last good checkpoint is {self.out / CHECKPOINT}"), lr=lr)
            if due:
                if held is not None and held_wanted is not None:
                    self._judge(held, held_wanted, log)
                state.seconds = time.perf_counter() - started
                state.save(self.out, self.identity)
            watch(min(state.step * order.batch_size, order.length), order.length)

    def result(self) -> DistillResult:
        state, order = self.state, self.order
        last = replace(self.pupil, module=state.result.eval())
        checkpoint.save(self.out / "last", last, {"step": state.step})
        if not len(self.held):
            checkpoint.save(self.out / "best", last, {"step": state.step})
        best = replace(last, module=copy.deepcopy(last.module))
        best.module.load_state_dict(load_file(self.out / "best" / "model.safetensors", device=str(self.device)))
        agreement, best_agreement = (state.last[0], state.best[0]) if len(self.held) else (None, None)
        best_step = state.best_step if len(self.held) else state.step
        seconds = round(state.seconds, 3)
        return DistillResult(last, best, agreement, best_agreement, best_step, order.steps, order.length, seconds)

    def _judge(self, images: Tensor, wanted: Tensor, log: Log) -> None:
        state, pupil = self.state, replace(self.pupil, module=self.state.result.eval())
        state.last = score(logits_of(pupil, images), wanted, self.settings.temperature)
        log.write(state.step, agreement=state.last[0], held_out_loss=-state.last[1])
        if state.last > state.best:
            state.best, state.best_step = state.last, state.step
            checkpoint.save(self.out / "best", pupil, {"step": state.step, "agreement": state.last[0]})
        self.pupil.module.train()


def run_length(settings: DistillSettings, images: int) -> int:
    """How many images a run shows, of which ``images`` are for training."""
    if settings.steps is not None:
        return settings.steps * settings.batch_size
    return (EPOCHS if settings.epochs is None else settings.epochs) * images


def _place(module: nn.Module, device: torch.device) -> nn.Module:
    return module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _clear(out: Path) -> None:
    for file in (CHECKPOINT, "log.jsonl"):
        (out / file).unlink(missing_ok=True)
    for folder in ("last", "best"):
        shutil.rmtree(out / folder, ignore_errors=True)
