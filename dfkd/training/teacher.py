"""Supervised training of a classifier from scratch, on batches of a loader.

SGD with Nesterov momentum on the cross-entropy. All randomness comes from one seed, so a run repeats itself, also
where it was stopped between two epochs and goes on.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dfkd.data.loader import Form, Images, Source, Step, draw
from dfkd.runtime import derived_seed, seed_global
from dfkd.teachers.classifier import Classifier

SCHEDULES = ("multistep", "cosine", "onecycle")
# Shares of the run after which multistep divides the rate by ten: epochs 150, 180 and 210 of the published 240.
MILESTONES = (150 / 240, 180 / 240, 210 / 240)
WARM_SHARE = 0.3
AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """lr is the highest rate; schedule one of SCHEDULES; augment a kind of dfkd.data.loader.views; amp off|bf16|fp16."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    schedule: str
    augment: str
    label_smoothing: float
    amp: str
    seed: int


@dataclass(frozen=True)
class Epoch:
    """What one epoch did: mean loss and accuracy on its augmented training images, rate at its end, seconds so far."""

    number: int
    loss: float
    train_accuracy: float
    lr: float
    seconds: float


def rate(done: float, schedule: str) -> float:
    """Learning rate as a share of its highest value, after the share ``done`` in [0, 1] of the run.

    multistep: x 0.1 at 5/8, 6/8 and 7/8. cosine: (1 + cos(pi done)) / 2. onecycle: a straight rise from 1/25 over
    the first 30 %, then a cosine down to 0 (Smith and Topin, arXiv:1708.07120).
    """
    if schedule == "multistep":
        return 0.1 ** sum(done >= milestone for milestone in MILESTONES)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if done < WARM_SHARE:
        return 0.04 + 0.96 * done / WARM_SHARE
    return (1 + math.cos(math.pi * (done - WARM_SHARE) / (1 - WARM_SHARE))) / 2


class State:
    """A network in training, on the device that it is on, after ``epoch`` epochs that took ``seconds``.

    The network is changed in place. The generator, of order and augmentation, is on the CPU whatever the device.
    """

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        self.device = next(network.parameters()).device
        self.network: nn.Module = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            _parameter_groups(network, recipe.weight_decay),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.momentum > 0,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.epoch = 0
        self.seconds = 0.0

    def content(self) -> dict[str, Any]:
        """What load() takes to be in this state again."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
            "seconds": self.seconds,
        }

    def load(self, content: Mapping[str, Any]) -> None:
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.generator.set_state(content["generator"].cpu())
        self.epoch, self.seconds = content["epoch"], content["seconds"]


def train(
    classifier: Classifier,
    source: Source,
    count: int,
    recipe: Recipe,
    after_epoch: Callable[[Epoch], None],
    state: State | None = None,
) -> None:
    """Train classifier.module in place, on the device that it is on, until it has had recipe.epochs epochs.

    source: batches of ``count`` images in the form that form_of states. The last, partial batch of an epoch is left
    out, since BatchNorm wants batches of one size; the shuffle leaves out others each time. state: of that module,
    where to go on; by default the beginning. It is complete whenever after_epoch is called.
    """
    state = state or State(classifier.module, recipe)
    started = time.perf_counter() - state.seconds
    with torch.random.fork_rng(devices=[state.device] if state.device.type == "cuda" else []):
        while state.epoch < recipe.epochs:
            loss, right = _one_epoch(state, classifier, source, count, recipe)
            state.epoch, state.seconds = state.epoch + 1, time.perf_counter() - started
            lr = float(state.optimizer.param_groups[0]["lr"])
            after_epoch(Epoch(state.epoch, loss, right, lr, state.seconds))
    state.network.eval()


def form_of(classifier: Classifier, recipe: Recipe) -> Form:
    """What classifier.module takes in training, where it is."""
    device = next(classifier.module.parameters()).device
    return Form(classifier.input_size, classifier.mean, classifier.std, device, AMP_DTYPES[recipe.amp])


def _one_epoch(state: State, classifier: Classifier, source: Source, count: int, recipe: Recipe) -> tuple[float, float]:
    """Mean loss and accuracy on the views of the epoch after state.epoch."""
    device, optimizer, scaler = state.device, state.optimizer, state.scaler
    state.network.train()
    # Layers such as dropout draw from torch's global generator, which a resumed run would find in another state.
    seed_global(derived_seed(recipe.seed, "dropout", state.epoch), device)
    batch_size = min(recipe.batch_size, count)
    per_epoch = count // batch_size
    # Kept on the device: reading them every step would make it wait.
    loss_sum = torch.zeros((), device=device)
    right = torch.zeros((), device=device)
    steps = _steps(state.generator, count, batch_size, recipe.augment, classifier.input_size)
    for index, batch in enumerate(source.batches(steps)):
        done = (state.epoch * per_epoch + index) / (per_epoch * recipe.epochs)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * rate(done, recipe.schedule)
        with torch.autocast(device.type, AMP_DTYPES[recipe.amp], enabled=recipe.amp != "off"):
            logits = classifier.module(batch.images)
        loss = F.cross_entropy(logits.float(), batch.labels, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
        loss_sum += loss.detach()
        right += (logits.argmax(1) == batch.labels).sum()
    return float(loss_sum) / per_epoch, float(right) / (per_epoch * batch_size)


def _steps(generator: torch.Generator, count: int, batch_size: int, kind: str, size: int) -> Iterator[Step]:
    """One epoch's. A source that asks ahead draws no more than the epoch, so the generator ends where it should."""
    order = torch.randperm(count, generator=generator)
    for start in range(0, count - batch_size + 1, batch_size):
        yield Step(order[start : start + batch_size], draw(kind, batch_size, size, size, generator))


@torch.no_grad()
def accuracy(classifier: Classifier, data: Images, batch_size: int = 500) -> float:
    """Share, in 0..1, of the images that the classifier puts in their class, in evaluation mode."""
    classifier.module.eval()
    device = next(classifier.module.parameters()).device
    right = 0
    for positions in torch.split(torch.arange(len(data.labels)), batch_size):
        logits = classifier.logits(data.read(positions).to(device).float() / 255)
        right += int((logits.argmax(1) == data.labels[positions].to(device)).sum())
    return right / len(data.labels)


def _parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weights decay; biases and BatchNorm's scales do not."""
    weights = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in network.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
