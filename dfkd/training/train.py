"""Distillation: a student learns a frozen teacher's answers on synthetic images.

OUT/last, OUT/best     the student as model.safetensors + config.json
OUT/checkpoint.pt      the state to resume from
OUT/log.jsonl          losses and checks on the held-out images
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfkd.runtime import resolve_device
from dfkd.training.cached_logits import choose_cache, logits_table
from dfkd.training.checks import AMP_DTYPES, check, check_last_batch
from dfkd.training.consistency import Compared, compared
from dfkd.training.guard import Guard
from dfkd.training.held_out import split
from dfkd.training.identity import identity
from dfkd.training.logs import LOG, Logs
from dfkd.training.mixing import mix
from dfkd.training.normalisation import synchronised
from dfkd.training.schedule import learning_rate
from dfkd.training.settings import EPOCHS, DistillSettings
from dfkd.training.signals import deferred
from dfkd.training.state import State
from dfkd.training.step import Step
from dfkd.training.students import DistillResult, HeldOut, finish, result_of
from dfkd.training.world import Agreement, World
from dfkd.errors import Stopped
from dfkd.files import folder_lock, make_writable, remove_partials
from dfkd.runtime import choose_kernels
from dfkd.data.loader import Batch, Form, Images, Order, Source, choose, open_source, read_all, steps
from dfkd.runtime import derived_seed, seed_global
from dfkd.training.resume import CHECKPOINT, read_checkpoint
from dfkd.teachers.classifier import Classifier

LOG_EVERY = 50
CHECKS = 20  # of the held-out images in a run, unless checkpoint_every says otherwise


def distill(
    data: Images,
    teacher: Classifier,
    student: nn.Module,
    settings: DistillSettings,
    out: Path,
    *,
    architecture: str = "",
    world: World | None = None,
    watch: Callable[[int, int], object] = lambda done, total: None,
    say: Callable[[str], object] = lambda text: None,
) -> DistillResult:
    """Train ``student`` in place on the pool ``data`` and leave its checkpoints in ``out``.

    student takes what the teacher takes, normalised images of its input size; architecture is the name that
    dfkd.teachers.build knows it by. A run that was stopped goes on where its last checkpoint was, with the same result
    (bit for bit on a CPU); a finished one returns at once. watch(images shown, images in all) is called after every
    step, say(text) with what a user should know.

    world: of dfkd.training.world.join where the run has several processes, each of which calls this with the same
    arguments; the first alone writes. Its device is then the run's.

    Raises UsageError for classes that disagree, what cannot work on the device or with other settings, an ``out`` of
    other settings or in use, and a run that has diverged; Stopped for SIGTERM and SIGINT, after a checkpoint at the end
    of the step (in the main thread).
    """
    world = world or World(resolve_device(settings.device))
    kernels = choose_kernels(settings.kernels, world.device)
    check(data, teacher, student, settings, world)
    maps = compared(teacher.module, student, teacher.input_size, settings)
    devices = [world.device] if world.device.type == "cuda" else []
    with ExitStack() as held, torch.random.fork_rng(devices=devices):
        name = architecture or type(student).__name__
        run = _Run(data, teacher, student, settings, out, name, world)
        run.begin(held, say)
        if run.state.step < run.order.steps:
            say(f"kernels: {kernels.name} ({kernels.why})")
            if maps is not None:
                say(maps.in_words())
            run.train(run.source(say), run.known_logits(say), kernels.name, watch, maps)
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
        world: World,
    ) -> None:
        self.data, self.settings, self.out, self.world, self.device = data, settings, out, world, world.device
        self.identity = identity(data, teacher, architecture, settings)
        twice = settings.msarc_weight and settings.msarc_maps != "cam"  # no SyncBatchNorm is differentiated twice
        student = synchronised(student, "off" if twice else settings.sync_bn, world)
        self.teacher = replace(teacher, module=_place(teacher.module, self.device).eval())
        self.pupil = replace(teacher, module=_place(student, self.device), architecture=architecture)
        self.rows, self.held = split(data.ids, settings.held_out)
        length = run_length(settings, len(self.rows))
        self.order = Order(settings.seed, len(self.rows), settings.batch_size, length, world.rank, world.size)
        check_last_batch(self.order)
        self.every = settings.checkpoint_every or -(-self.order.steps // CHECKS)
        self.state = State(student, settings, self.device)
        # What autocast would round in front of the first layer may come rounded; what is blended is blended before.
        dtype = torch.float32 if settings.mix in ("mixup", "both") else AMP_DTYPES[settings.amp]
        self.form = Form(teacher.input_size, teacher.mean, teacher.std, self.device, dtype)
        self.pending: list[tuple[int, Tensor]] = []

    def begin(self, held: ExitStack, say: Callable[[str], object]) -> None:
        """Take the folder until ``held`` ends, and its checkpoint up where there is one."""

        def first() -> Any:
            make_writable(self.out)
            held.enter_context(folder_lock(self.out))
            remove_partials(self.out)
            if not self.settings.resume:
                _clear(self.out)
            return read_checkpoint(self.out, self.identity, torch.device("cpu"))

        saved = self.world.from_first(first)
        if saved is None:
            self.save()  # the initial weights, and whose folder this is
            return
        self.state.load(saved)
        self.pending = [(step, loss.to(self.device)) for step, loss in saved["losses"]]
        if saved["processes"] != self.world.size:
            say(
                f"the run had {saved['processes']} processes and goes on with {self.world.size}: sums are rounded "
                "otherwise, and BatchNorm's statistics are over another part of the batch unless --sync-bn acts"
            )

    def save(self, losses: list[tuple[int, Tensor]] | None = None) -> None:
        if self.world.first:
            self.state.save(self.out, self.identity, losses=losses or [], processes=self.world.size)

    def source(self, say: Callable[[str], object]) -> Source:
        settings = self.settings
        choice = choose(settings.loader, len(self.rows), self.form.size, self.device)
        say(f"loader: {choice.name} ({choice.why})")
        rows = len(self.order.batch(0))
        return open_source(choice, self.data, self.rows, self.form, settings.augment, rows, settings.workers)

    def known_logits(self, say: Callable[[str], object]) -> Tensor | None:
        """The teacher's logits of every training image, where no step changes what it sees."""
        choice = choose_cache(self.settings, len(self.rows), len(self.pupil.class_names))
        if not choice.on:
            return None
        say(f"the teacher's logits are cached ({choice.why})")
        amp, rows = AMP_DTYPES[self.settings.amp], len(self.order.batch(0))
        return logits_table(self.teacher, self.data, self.rows, self.form, rows, amp)

    def train(
        self,
        source: Source,
        known: Tensor | None,
        kernels: str,
        watch: Callable[[int, int], object],
        maps: Compared | None,
    ) -> None:
        """From the state's step to the run's last; ``known``: of known_logits; ``maps``: what mSARC compares."""
        settings, order, state, world = self.settings, self.order, self.state, self.world
        held_out = None
        if world.first and len(self.held):
            images = read_all(self.data, self.held, self.form.size)
            held_out = HeldOut(images, self.teacher, settings.temperature)
        step = Step(self.teacher.module, state, settings, world, len(order.batch(0)), kernels, maps)
        guard, agreed = self.guard(), Agreement(world)
        started, first = time.perf_counter() - state.seconds, state.step
        watch(first * order.batch_size, order.length)
        self.pupil.module.train()
        with deferred() as received, self._logs() as log:
            for now, batch in enumerate(source.batches(steps(order, settings.augment, self.form.size, first)), first):
                lr = learning_rate(
                    now, order.steps, settings.lr, settings.schedule, settings.milestone_parts(), settings.warmup
                )
                guard.add(state.step + 1, self._one(step, now, batch, known, lr))
                due = state.step % self.every == 0 or state.step == order.steps
                stop = agreed(received()) if state.step < order.steps else 0
                if due or state.step % LOG_EVERY == 0:
                    log(state.step, loss=guard.report(int(state.skipped)), lr=lr, **state.measured())
                if due or stop:
                    guard.check_weights(state.step, state.student)
                    if due and held_out is not None:
                        log(state.step, **held_out.judge(state, self.pupil, self.out))
                        self.pupil.module.train()
                    state.seconds = time.perf_counter() - started
                    self.save(guard.pending())
                watch(min(state.step * order.batch_size, order.length), order.length)
                if stop:
                    raise Stopped(stop, f"stopped after step {state.step} of {order.steps}; started again it goes on")

    def _one(self, step: Step, now: int, batch: Batch, known: Tensor | None, lr: float) -> Tensor:
        """Step ``now`` of the run, counted from 0; returns its loss."""
        settings, order, rank = self.settings, self.order, self.world.rank
        seed_global(derived_seed(settings.seed, f"dropout/{rank}" if rank else "dropout", now), self.device)
        assert batch.random is not None  # the steps of a run have their own
        total = order.size(now)
        images = mix(batch.images, settings.mix, settings.mix_alpha, batch.random, total, order.rows(now))
        images = images.contiguous(memory_format=torch.channels_last)
        wanted = None if known is None else known[order.batch(now).to(self.device)]
        return step(images, batch.labels, wanted, lr, len(images) * self.world.size / total)

    @contextmanager
    def _logs(self) -> Iterator[Callable[..., None]]:
        """What writes to the run's logs; only the first process has any."""
        if not self.world.first:
            yield lambda step, **measured: None
            return
        log = Logs(self.out, self.state.step, self.settings, self.identity)
        try:
            yield log.write
        finally:
            log.close()

    def guard(self) -> Guard:
        def ids(step: int) -> list[int]:
            return self.data.ids[self.rows[self.order.global_batch(step - 1)]].tolist()

        last_good = f"the last good checkpoint is {self.out / CHECKPOINT}"
        return Guard(self.world.mean, ids, last_good, int(self.state.skipped), self.pending)

    def result(self) -> DistillResult:
        order, held_out = self.order, bool(len(self.held))
        if self.world.first:
            return finish(self.state, self.pupil, self.out, held_out, order.steps, order.length)
        last = replace(self.pupil, module=self.state.result.eval())
        return result_of(self.state, last, last, held_out, order.steps, order.length)


def run_length(settings: DistillSettings, images: int) -> int:
    """How many images a run shows, of which ``images`` are for training."""
    if settings.steps is not None:
        return settings.steps * settings.batch_size
    return (EPOCHS if settings.epochs is None else settings.epochs) * images


def _place(module: nn.Module, device: torch.device) -> nn.Module:
    return module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _clear(out: Path) -> None:
    for file in (CHECKPOINT, LOG):
        (out / file).unlink(missing_ok=True)
    for folder in ("last", "best", "tensorboard"):
        shutil.rmtree(out / folder, ignore_errors=True)
