"""Presets: the published numbers, and each key an option that its command accepts."""

import importlib
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import pytest

from dfkd.cli.values import check, convert
from dfkd.presets import PRESETS

COMMANDS = {
    "dfkd-train-teacher": "dfkd.cli.train_teacher",
    "dfkd-generate": "dfkd.cli.generate_options",
    "dfkd-distill": "dfkd.cli.distill",
}


def options_of(command: str) -> type[Any]:
    """The one options class that the command's module defines."""
    module = importlib.import_module(COMMANDS[command])
    found = [thing for name, thing in vars(module).items() if name.endswith("Options")]
    (cls,) = [thing for thing in found if is_dataclass(thing) and thing.__module__ == module.__name__]
    return cls  # type: ignore[return-value]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_key_is_an_option_and_every_value_passes_its_checks(name: str, command: str) -> None:
    cls = options_of(command)
    known, kinds = {spec.name: spec for spec in fields(cls)}, get_type_hints(cls)
    for key, value in PRESETS[name].overrides(command).items():
        assert key in known, f"{command} has no option {key}"
        check(convert(value, kinds[key], key), known[key], key)


def test_the_presets() -> None:
    assert list(PRESETS) == ["demo", "cifar10", "cifar10-label", "domainnet-sketch", "domainnet-quickdraw", "fedcado"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_demo_sets_every_command(command: str) -> None:
    assert PRESETS["demo"].overrides(command)


# DiffDFKD's and FedCADO's tables: loss weights (bn, cls, adv), CFG, steps, images.
PUBLISHED = {
    "cifar10": ((0.1, 1.0, 0.0), 3.0, 50, 50_000),
    "cifar10-label": ((0.0, 1.0, 0.0), 3.0, 10, 5_000 * 10),
    "domainnet-sketch": ((0.1, 1.0, 1.0), 7.0, 70, 200 * 10),
    "domainnet-quickdraw": ((0.1, 1.0, 0.0), 3.0, 70, 4_500 * 10),
    "fedcado": ((0.1, 1.0, 0.0), 3.0, 50, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    asked = PRESETS[name].generate
    weights = tuple(asked[key] for key in ("bn_weight", "cls_weight", "adv_weight"))
    assert (weights, asked["cfg"], asked["steps"], asked.get("count")) == PUBLISHED[name]
    assert (asked["sampler"], asked["size"]) == ("ddpm", 512)


@pytest.mark.parametrize("name", ["cifar10", "domainnet-sketch", "domainnet-quickdraw"])
def test_latent_cutmix_is_due_every_fifth_of_the_steps(name: str) -> None:
    asked = PRESETS[name].generate
    assert asked["cutmix_every"] * 5 == asked["steps"]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "lr", "epochs", "decay"), [("cifar10", 0.2, 240, 5e-4), ("domainnet-sketch", 0.1, 220, 1e-4)]
)
def test_published_distillation(name: str, lr: float, epochs: int, decay: float) -> None:
    asked = PRESETS[name].distill
    assert (asked["lr"], asked["epochs"], asked["weight_decay"]) == (lr, epochs, decay)
    assert (asked["batch_size"], asked["momentum"], asked["temperature"]) == (256, 0.9, 30.0)
