"""Supervised training: it learns, repeats itself, goes on where it was stopped, and its rate follows the schedule."""

import functools
import io
from dataclasses import replace

import pytest
import torch
from torch import nn

from dfkd import teachers
from dfkd.data.loader.resident import Resident
from dfkd.data.shards import Pool
from dfkd.teachers.classifier import Classifier
from dfkd.training.teacher import SCHEDULES, Recipe, State, _parameter_groups, accuracy, form_of, rate, train

RECIPE = Recipe(
    epochs=3,
    batch_size=16,
    lr=0.05,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="cosine",
    augment="crop-flip",
    label_smoothing=0.1,
    amp="off",
    seed=1,
)


def dark_and_light() -> tuple[torch.Tensor, torch.Tensor]:
    """70 noisy 8x8 images, the odd ones lighter."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(70) % 2
    images = torch.randint(0, 100, (70, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return images + (labels * 120).to(torch.uint8).view(-1, 1, 1, 1), labels


def pool(images: torch.Tensor, labels: torch.Tensor) -> Pool:
    return Pool(images, labels, torch.arange(len(labels)), ("dark", "light"))


def source(classifier: Classifier, recipe: Recipe = RECIPE) -> tuple[Resident, int]:
    data = pool(*dark_and_light())
    return Resident(data, data.ids, form_of(classifier, recipe)), len(data.ids)


@functools.cache
def fit(run: int):
    """The classifier and its epochs; ``run`` only tells repetitions apart."""
    torch.manual_seed(0)
    network = teachers.build("resnet8", 2)
    classifier = Classifier(network, "resnet8", ("dark", "light"), 8, (0.4,) * 3, (0.3,) * 3)
    epochs = []
    train(classifier, *source(classifier), RECIPE, epochs.append)
    return classifier, epochs


def test_learns_and_reports():
    classifier, epochs = fit(0)
    assert not classifier.module.training
    assert [epoch.number for epoch in epochs] == [1, 2, 3]
    assert epochs[-1].loss < epochs[0].loss
    assert epochs[-1].lr < epochs[0].lr < RECIPE.lr
    assert accuracy(classifier, pool(*dark_and_light()), batch_size=32) == 1.0


def test_same_seed_same_weights():
    first, second = (fit(run)[0].module.state_dict() for run in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


class Killed(Exception):
    pass


def with_dropout(seed: int) -> Classifier:
    """BatchNorm, dropout and momentum: all that has a state or draws random numbers."""
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 2))
    return Classifier(nn.Sequential(*layers), "tiny", ("dark", "light"), 8, (0.4,) * 3, (0.3,) * 3)


@pytest.mark.parametrize("changes", [{}, {"schedule": "onecycle", "amp": "bf16"}])
@pytest.mark.parametrize("killed", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bits(killed, changes):
    recipe = replace(RECIPE, **changes)
    whole, whole_epochs = with_dropout(0), []
    train(whole, *source(whole, recipe), recipe, whole_epochs.append)

    stopped, epochs, kept = with_dropout(0), [], io.BytesIO()
    state = State(stopped.module, recipe)

    def after_epoch(epoch):
        epochs.append(epoch)
        torch.save(state.content(), kept)
        if epoch.number == killed:
            raise Killed
        kept.seek(0)

    with pytest.raises(Killed):
        train(stopped, *source(stopped, recipe), recipe, after_epoch, state)
    resumed = with_dropout(99)
    state = State(resumed.module, recipe)
    kept.seek(0)
    state.load(torch.load(kept, weights_only=True))
    assert state.epoch == killed and state.seconds == epochs[-1].seconds
    torch.rand(7)  # whatever else the new process draws
    train(resumed, *source(resumed, recipe), recipe, epochs.append, state)

    mine, theirs = resumed.module.state_dict(), whole.module.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert [replace(epoch, seconds=0) for epoch in epochs] == [replace(epoch, seconds=0) for epoch in whole_epochs]
    assert [epoch.seconds for epoch in epochs] == sorted(epoch.seconds for epoch in epochs)


def test_training_leaves_torchs_generator_alone():
    classifier = with_dropout(0)
    before = torch.get_rng_state()
    train(classifier, *source(classifier), RECIPE, lambda epoch: None)
    assert torch.equal(torch.get_rng_state(), before)


def test_accuracy_counts():
    classifier, _ = fit(0)
    images, labels = dark_and_light()
    assert accuracy(classifier, pool(images, 1 - labels)) == 0.0
    assert accuracy(classifier, pool(images, torch.zeros_like(labels))) == 0.5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rate_is_a_share(schedule):
    shares = [rate(step / 1000, schedule) for step in range(1000)]
    assert max(shares) == pytest.approx(1.0, abs=1e-3)
    assert 0 < shares[-1] == min(shares) < 2e-3


def test_rate_landmarks():
    assert [rate(done, "multistep") for done in (0, 0.624, 0.626, 0.76, 0.9)] == pytest.approx([1, 1, 0.1, 0.01, 1e-3])
    assert rate(0.5, "cosine") == pytest.approx(0.5)
    assert rate(0, "onecycle") == pytest.approx(0.04)
    assert rate(0.3, "onecycle") == pytest.approx(1)


def test_weight_decay_spares_biases_and_batch_norm():
    network = teachers.build("resnet8", 2)
    decayed, spared = _parameter_groups(network, 0.1)
    assert {weight.ndim for weight in decayed["params"]} == {2, 4}
    assert {weight.ndim for weight in spared["params"]} == {1} and spared["weight_decay"] == 0
    assert len(decayed["params"]) + len(spared["params"]) == len(list(network.parameters()))
