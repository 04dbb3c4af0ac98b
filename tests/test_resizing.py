"""How a network is shown images of another side: beside torch and Pillow, and what reaches a pixel of the image."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dfkd.cli.parse import parse
from dfkd.config import (
    RESIZES,
    Config,
    DistillCommand,
    EvaluateCommand,
    GenerateCommand,
    GenerateConfig,
    TrainTeacherCommand,
    leaves,
    presets,
)
from dfkd.data import resize
from dfkd.errors import UsageError
from dfkd.resizing import resized
from dfkd.synthesis.checks import build_command
from dfkd.teachers import Classifier, build


def noise(side: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(side)).to(dtype)


def own_side(network: nn.Module, resize: str) -> Classifier:
    """A classifier of images of 32 pixels."""
    return Classifier(network, ("a", "b"), (0.0,) * 3, (1.0,) * 3, 32, resize=resize)


@pytest.mark.parametrize(("how", "share"), [("antialias", 1.0), ("published", 1 / 16)])
def test_which_pixels_a_gradient_reaches_from_512_to_32(how: str, share: float) -> None:
    images = noise(512).requires_grad_()
    logits = own_side(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), how).logits(images)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), images)
    assert float((gradient != 0).float().mean()) == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [512, 48, 33, 31, 8])
def test_beside_torch(side: int, dtype: torch.dtype) -> None:
    """Larger images by an antialiased kernel or the published one; smaller ones by one kernel, whatever is asked."""
    images, larger = noise(side, dtype), side > 32
    for how in RESIZES:
        aa = larger and how == "antialias"
        assert torch.equal(resized(images, 32, how), F.interpolate(images, (32, 32), mode="bicubic", antialias=aa))
    assert larger != torch.equal(*(resized(images, 32, how) for how in RESIZES))
    assert (own := noise(32)) is resized(own, 32, how)


@pytest.mark.parametrize("side", [512, 100, 40])
def test_beside_pillow(side: int) -> None:
    """Within two levels: Pillow rounds to eight bits between its passes. It cuts there too, which no grey needs."""
    pixels = (128 + 64 * (noise(side) - 0.5)).round().to(torch.uint8)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    found = [np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)) for picture in pictures]
    wanted = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)
    assert (resize(pixels, 32).int() - wanted.int()).abs().max() <= 2
    assert (resize(pixels, 32, "published").int() - wanted.int()).abs().max() > 2


def test_images_that_are_read_are_those_that_guidance_showed() -> None:
    images = noise(96)
    pixels = (images * 255).round().to(torch.uint8)
    for how in RESIZES:
        shown = own_side(nn.Identity(), how).prepare(pixels.float() / 255).clamp(0, 1)
        assert (resize(pixels, 32, how).float() / 255 - shown).abs().max() <= 0.5001 / 255


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (TrainTeacherCommand, ("--data", "digits-on-photos", "--architecture", "resnet8", "--out", "x")),
        (GenerateCommand, ("--out", "x")),
        (DistillCommand, ("--data", "x", "--student", "resnet8", "--out", "x")),
        (EvaluateCommand, ("--data", "digits-on-photos", "--teacher", "timm:resnet18")),
    ],
)
def test_every_command_of_a_teacher_takes_it(command: type[Config], words: tuple[str, ...]) -> None:
    assert parse(command, [*words, "--resize", "published"], "dfkd-it").flat()["resize"] == "published"
    assert parse(command, list(words), "dfkd-it").flat()["resize"] in (None, "antialias")
    with pytest.raises(UsageError, match=r"resize is '?bicubic.*antialias, published"):
        parse(command, [*words, "--resize", "bicubic"], "dfkd-it")


def test_published_presets_resize_as_their_programs() -> None:
    """FedCADO's shows a pixel of 16 to its teachers; in DiffDFKD's that is commented out."""
    for name, preset in presets().items():
        published = name == "fedcado"
        for command in (TrainTeacherCommand, GenerateCommand, DistillCommand):
            if "resize" in leaves(command) and command.SECTION in preset:
                assert preset[command.SECTION].get("resize") == ("published" if published else None), name


def test_the_command_that_builds_engines_names_what_the_source_does_not_state(tmp_path: Path) -> None:
    prior: Any = SimpleNamespace(source="demo", files={})
    half = (0.5, 0.5, 0.5)
    for kept in RESIZES:
        Classifier(build("resnet8", 2), ("a", "b"), half, half, 32, "resnet8", kept).save_pretrained(tmp_path)
        for how in RESIZES:
            teacher = Classifier.from_pretrained(tmp_path, resize=how)
            words = build_command(GenerateConfig(), prior, teacher).split()
            assert ("--resize" in words) == (how != kept) and (how == kept or words[-1] == how)


def test_a_way_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError, match="resize 'area': known are antialias, published"):
        own_side(nn.Identity(), "area")
