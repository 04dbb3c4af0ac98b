"""Presets: the published numbers, and each key an option that its command accepts."""

import pytest

from dfkd.cli.parse import parse
from dfkd.config import (
    Config,
    DistillCommand,
    DistillConfig,
    GenerateCommand,
    GenerateConfig,
    TeacherTrainConfig,
    TrainPriorCommand,
    TrainTeacherCommand,
    presets,
)

# Command -> the options that a preset may leave to the user.
COMMANDS: dict[type[Config], tuple[str, ...]] = {
    TrainTeacherCommand: ("--data", "digits-on-photos"),
    TrainPriorCommand: ("--data", "x"),
    GenerateCommand: (),
    DistillCommand: ("--data", "x"),
}


@pytest.mark.parametrize("cls", COMMANDS)
@pytest.mark.parametrize("name", presets())
def test_every_key_is_an_option_and_every_value_passes_its_checks(name: str, cls: type[Config]) -> None:
    if cls.SECTION not in presets()[name]:
        pytest.skip("the preset sets nothing of this command")
    student = ("--student-checkpoint", "x") if presets()[name][cls.SECTION].get("adv-weight") else ()
    parse(cls, ["--out", "x", "--preset", name, *COMMANDS[cls], *student], "dfkd-it")


# DiffDFKD's and FedCADO's programs: loss weights (bn, cls, adv), CFG, steps, prompt, images of a trajectory, images.
PUBLISHED = {
    "cifar10": ((0.1, 1.0, 0.0), 3.0, 50, "A realistic photo.", 5, 50_000),
    "cifar10-label": ((0.0, 1.0, 0.0), 3.0, 10, "A realistic photo of {label}", 5, 5 * 5_000 * 10),
    "domainnet-sketch": ((0.1, 1.0, 1.0), 7.0, 70, "an image.", 5, 5 * 200 * 10),
    "domainnet-quickdraw": ((0.1, 1.0, 0.0), 3.0, 70, "an image.", 5, 4_500 * 10),
    "fedcado": ((0.1, 1.0, 0.0), 3.0, 50, "an image of {label}", 1, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    asked = GenerateConfig.preset(name)
    weights = tuple(getattr(asked.guidance, key) for key in ("bn_weight", "cls_weight", "adv_weight"))
    own, guidance = asked.sampling, asked.guidance
    count = presets()[name]["generate"].get("count")
    assert (weights, own.cfg, own.steps, own.prompt, 1 + own.keep_intermediates, count) == PUBLISHED[name]
    assert (own.sampler, own.size) == ("ddpm", 512)
    assert (guidance.gradient, guidance.norm, guidance.step, guidance.repeats) == ("unet", "none", 1.0, 1)
    assert (guidance.bn_stats, guidance.bn_loss, guidance.start, guidance.stop) == ("image", "norm", 0.0, 1.0)
    if name.startswith("domainnet") or name == "cifar10":
        assert asked.cutmix.every * 5 == own.steps and asked.cutmix.form == "code"


@pytest.mark.parametrize("name", ["cifar10-fast", "domainnet-fast"])
def test_a_fast_preset_calls_the_network_once_a_guided_step(name: str) -> None:
    asked = GenerateConfig.preset(name)
    own, guidance = asked.sampling, asked.guidance
    assert (guidance.gradient, guidance.norm, guidance.bn_stats) == ("latent", "rms", "group")
    assert own.cfg_to == guidance.start and own.keep_intermediates == 0
    assert DistillConfig.preset(name).student == {"cifar10-fast": "resnet8"}.get(name, "resnet18_imagenet")


@pytest.mark.parametrize(
    ("name", "lr", "epochs", "decay"), [("cifar10", 0.2, 240, 5e-4), ("domainnet-sketch", 0.1, 220, 1e-4)]
)
def test_published_distillation(name: str, lr: float, epochs: int, decay: float) -> None:
    asked = DistillConfig.preset(name)
    assert (asked.train.optimiser.lr, asked.train.epochs, asked.train.optimiser.weight_decay) == (lr, epochs, decay)
    assert (asked.train.batch_size, asked.train.optimiser.momentum, asked.temperature) == (256, 0.9, 30.0)


# Fast-Datafree's train_scratch.py and DiffDFKD's: batch, rate, epochs, decay of all parameters, and what the rate does.
SCRATCH = {
    **dict.fromkeys(("cifar10", "cifar10-label", "cifar100", "tiny-imagenet"), (256, 0.1, 200, 1e-4, "multistep")),
    **dict.fromkeys(("domainnet-sketch", "domainnet-quickdraw"), (128, 0.01, 120, 2e-4, "constant")),
}


@pytest.mark.parametrize("name", SCRATCH)
def test_published_teachers_take_plain_sgd(name: str) -> None:
    train = TeacherTrainConfig.preset(name).train
    own = train.optimiser
    assert (train.batch_size, own.lr, train.epochs, own.weight_decay, own.schedule) == SCRATCH[name]
    assert (own.optimiser, own.momentum, own.nesterov, own.decay) == ("sgd", 0.9, False, "all")
    if own.schedule == "multistep":
        assert (own.milestone_parts(), own.gamma) == ((0.6, 0.75, 0.9), 0.2)


@pytest.mark.parametrize("given", [{"epochs": 1}, {"steps": 5}])
@pytest.mark.parametrize("name", presets())
def test_a_length_that_is_given_takes_the_place_of_the_presets(name: str, given: dict[str, int]) -> None:
    ((length, value),) = given.items()
    for cls in (TrainTeacherCommand, TrainPriorCommand, DistillCommand):
        if cls.SECTION in presets()[name]:
            asked = parse(cls, ["--out", "x", "--preset", name, f"--{length}", str(value), *COMMANDS[cls]], "dfkd-it")
            assert {key: asked.flat()[key] for key in ("steps", "epochs")} == {"steps": None, "epochs": None, **given}


def test_the_demo_sets_every_command() -> None:
    for config in (TeacherTrainConfig, GenerateConfig, DistillConfig):
        assert config.preset("demo").changed()  # type: ignore[attr-defined]
