"""Supervised training of a classifier from scratch, on images that live on the device.

SGD with Nesterov momentum on the cross-entropy. All randomness comes from one seed, so a run repeats itself.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.distillation.augment import augment
from dfkd.teachers.classifier import Classifier

SCHEDULES = ("multistep", "cosine", "onecycle")
# Shares of the run after which multistep divides the rate by ten: epochs 150, 180 and 210 of the published 240.
MILESTONES = (150 / 240, 180 / 240, 210 / 240)
WARM_SHARE = 0.3
AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """lr is the highest rate; schedule one of SCHEDULES; augment a kind of distillation.augment; amp off|bf16|fp16."""

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


def train(
    classifier: Classifier, images: Tensor, labels: Tensor, recipe: Recipe, after_epoch: Callable[[Epoch], None]
) -> None:
    """Train classifier.module in place, on the device that it is on.

    images uint8 [N, 3, H, W], labels int64 [N]. The last, partial batch of an epoch is left out, since BatchNorm
    wants batches of one size; the shuffle leaves out others each time.
    """
    device = next(classifier.module.parameters()).device
    images, labels = images.to(device), labels.to(device)
    batch_size = min(recipe.batch_size, len(images))
    per_epoch = len(images) // batch_size
    total = per_epoch * recipe.epochs
    network = classifier.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        _parameter_groups(network, recipe.weight_decay),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
    generator = torch.Generator().manual_seed(recipe.seed)
    started = time.perf_counter()
    for epoch in range(recipe.epochs):
        network.train()
        order = torch.randperm(len(images), generator=generator).to(device)
        # Kept on the device: reading them every step would make it wait.
        loss_sum = torch.zeros((), device=device)
        right = torch.zeros((), device=device)
        for index in range(per_epoch):
            done = (epoch * per_epoch + index) / total
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * rate(done, recipe.schedule)
            rows = order[index * batch_size : (index + 1) * batch_size]
            views = augment(images[rows].float() / 255, recipe.augment, generator)
            views = views.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, AMP_DTYPES[recipe.amp], enabled=recipe.amp != "off"):
                logits = classifier.logits(views)
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(scaler.scale(loss))
            scaler.step(optimizer)
            scaler.update()
            loss_sum += loss.detach()
            right += (logits.argmax(1) == labels[rows]).sum()
        seen = per_epoch * batch_size
        lr = float(optimizer.param_groups[0]["lr"])
        seconds = time.perf_counter() - started
        after_epoch(Epoch(epoch + 1, float(loss_sum) / per_epoch, float(right) / seen, lr, seconds))
    network.eval()


@torch.no_grad()
def accuracy(classifier: Classifier, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Share, in 0..1, of uint8 images [N, 3, H, W] that the classifier puts in their class, in evaluation mode."""
    classifier.module.eval()
    device = next(classifier.module.parameters()).device
    right = 0
    for part, truth in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True):
        logits = classifier.logits(part.to(device).float() / 255)
        right += int((logits.argmax(1) == truth.to(device)).sum())
    return right / len(labels)


def _parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weights decay; biases and BatchNorm's scales do not."""
    weights = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in network.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
