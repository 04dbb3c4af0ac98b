"""The training loop: one for teacher and student.

OUT/checkpoint.pt      the state to resume from, removed by whoever saves the result
OUT/log.jsonl          losses, rates and what evaluations measured, by step
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dfkd.config import TrainConfig
from dfkd.data import Batch, Form, Images, Order, Source, choose_loader, open_source, some_names, steps
from dfkd.data.contact_sheet import preview
from dfkd.errors import Stopped, UsageError
from dfkd.logs import Logs
from dfkd.runtime import derived_seed, seed_global
from dfkd.training.folder import CHECKPOINT, read_checkpoint, write_checkpoint
from dfkd.training.guard import Guard
from dfkd.training.state import State, learning_rate
from dfkd.training.step import Loss, Step
from dfkd.training.trial import without_gradient
from dfkd.training.world import Agreement, World, deferred

LOG_EVERY = 50
CHECKS = 20  # evaluations of a run, unless checkpoint_every says otherwise

Progress = Callable[[int, int], object]
Say = Callable[[str], object]


def unmixed(batch: Batch, total: int, rows: slice) -> Tensor:
    """The images of a batch as they are."""
    return batch.images


def never(state: State) -> bool:
    """No early end."""
    return False


@dataclass(frozen=True)
class Training:
    """What differs between one training and another.

    network: trained in place, on the device. data, positions: images, and which of them (int64 [n]) are trained on.
    form: in which the network takes them. loss: of (the network as it is called, images, labels), a scalar.
    evaluate: of the state, on the first process: numbers for the log, {} for none; it may save and keep what it likes.
    mix: of a batch that is `rows` of a global batch of `total`: the images to train on.
    example: what the loss calls the network with, of two images, where that is not two images of the form.
    ended: whether a run ends at the state of a check, before its length; asked in the first process, of a state that
    `evaluate` has seen.
    """

    network: nn.Module
    data: Images
    positions: Tensor
    form: Form
    loss: Loss
    evaluate: Callable[[State], dict[str, float]]
    mix: Callable[[Batch, int, slice], Tensor] = unmixed
    example: tuple[Tensor, ...] | None = None
    ended: Callable[[State], bool] = never


def fit(
    training: Training,
    config: TrainConfig,
    out: Path,
    identity: Mapping[str, Any],
    world: World,
    progress: Progress,
    say: Say,
) -> State:
    """Train from the checkpoint in `out`, or from the beginning, to the end, or to where `training` ends it early;
    returns the last state.

    progress(images shown, images in all) is called before the first step and after each. torch's generators are left
    alone. The caller holds the folder. On a CPU a run that was stopped ends with the same bits as one that was not.

    Raises UsageError for a network that cannot be trained, a checkpoint of another run, a loader that cannot work and a
    run that has diverged; Stopped for SIGTERM and SIGINT, after a checkpoint at the end of the step (in the main
    thread).
    """
    order = order_of(config, len(training.positions), world)
    unused = without_gradient(training.network, training.form, order.batch_size // world.size, training.example)
    state = State(training.network, config, world.device)
    guard = _begin(training, state, order, out, identity, world, say)
    if state.step == order.steps or world.from_first(lambda: training.ended(state)):
        return state
    if unused:
        say(f"{len(unused)} parameters get no gradient and stay as they are: {some_names(unused)}")
    every = check_steps(config, order)
    step, agreed = Step(training.loss, state, config, world, bool(unused)), Agreement(world)
    source = _source(training, config, order, say)
    started = time.perf_counter() - state.seconds
    progress(state.step * order.batch_size, order.length)
    training.network.train()
    devices = [world.device] if world.device.type == "cuda" else []
    logs = Logs(out, state.step, config.logging, identity, world.first)
    with torch.random.fork_rng(devices), deferred() as signalled, logs as log:
        for batch in source.batches(steps(order, config.augment, training.form.size, state.step)):
            seed_layers(config.seed, state.step, world)
            total, rows = order.size(state.step), order.rows(state.step)
            images = training.mix(batch, total, rows).contiguous(memory_format=torch.channels_last)
            if state.step == 0:
                log.show(0, "views", partial(_views, training, images, batch.labels))
            lr = learning_rate(state.step, order.steps, config.optimiser)
            loss = step(images, batch.labels, lr, share=len(images) * world.size / total)
            guard.add(state.step, loss)

            due = state.step % every == 0 or state.step == order.steps
            stop = agreed(signalled()) if state.step < order.steps else 0
            if due or state.step % LOG_EVERY == 0:
                log.write(state.step, loss=guard.report(int(state.skipped)), lr=lr, **state.measured())
            if due or stop:
                guard.check_weights(state.step, state.network)
            if due and world.first and (measured := training.evaluate(state)):
                log.write(state.step, **measured)
                training.network.train()
            if due or stop:
                state.seconds = time.perf_counter() - started
                _save(state, out, identity, world, guard.pending())
            progress(state.step * order.batch_size, order.length)
            if due and training.ended is not never and world.from_first(lambda: training.ended(state)):
                break
            if stop:
                raise Stopped(stop, f"stopped after step {state.step} of {order.steps}; started again it goes on")
    return state


def check_steps(config: TrainConfig, order: Order) -> int:
    """Steps from one check, with its checkpoint, to the next."""
    return config.checkpoint_every or -(-order.steps // CHECKS)


def order_of(config: TrainConfig, count: int, world: World) -> Order:
    """Which of `count` training images each step takes: batches of one size, so that a run's last is no exception.

    Raises UsageError where a batch has no image for some process.
    """
    length = config.steps * config.batch_size if config.steps is not None else (config.epochs or 0) * count
    batch = min(config.batch_size, length)
    if batch < world.size:
        raise UsageError(
            f"--batch-size {batch} with {world.size} processes",
            "it is of all processes together, and each needs an image",
            "raise it, or start fewer processes",
        )
    return Order(config.seed, count, batch, length // batch * batch, world.rank, world.size)


def seed_layers(seed: int, step: int, world: World) -> None:
    """Seed what layers such as dropout draw from in one step, for each process otherwise."""
    seed_global(derived_seed(seed, f"dropout/{world.rank}" if world.rank else "dropout", step), world.device)


def _begin(
    training: Training, state: State, order: Order, out: Path, identity: Mapping[str, Any], world: World, say: Say
) -> Guard:
    """Take up the checkpoint in `out`, or write the first one, which says whose folder this is."""
    saved = world.from_first(lambda: read_checkpoint(out, identity))
    pending: list[tuple[int, Tensor]] = []
    if saved is None:
        _save(state, out, identity, world, pending)
    else:
        state.load(saved)
        pending = [(step, loss.to(world.device)) for step, loss in saved["losses"]]
        if saved["processes"] != world.size:
            say(
                f"the run had {saved['processes']} processes and goes on with {world.size}: sums are rounded "
                "otherwise, and BatchNorm's statistics are over another part of the batch unless --sync-bn acts"
            )

    def ids(step: int) -> list[int]:
        found: list[int] = training.data.ids[training.positions[order.global_batch(step - 1)]].tolist()
        return found

    last_good = f"the last good checkpoint is {out / CHECKPOINT}"
    return Guard(world.mean, ids, last_good, int(state.skipped), pending)


def _views(training: Training, images: Tensor, labels: Tensor) -> Image.Image:
    """A batch as the network sees it, by class."""
    form = training.form
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (form.mean, form.std))
    pixels = ((images.float() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return preview(pixels.cpu(), labels.cpu(), training.data.class_names)


def _save(state: State, out: Path, identity: Mapping[str, Any], world: World, losses: list[tuple[int, Tensor]]) -> None:
    if world.first:
        write_checkpoint(out, identity, {**state.content(), "losses": losses, "processes": world.size})


def _source(training: Training, config: TrainConfig, order: Order, say: Say) -> Source:
    form, count, rows = training.form, len(training.positions), len(order.batch(0))
    choice = choose_loader(config.loader.loader, count, form.size, form.device)
    say(f"loader: {choice.name} ({choice.why})")
    return open_source(choice, training.data, training.positions, form, config.augment, rows, config.loader.workers)
