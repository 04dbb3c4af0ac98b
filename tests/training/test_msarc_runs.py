"""mSARC in whole runs: pairs of the zoo, half precision, resumption, and nothing without it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dfkd import teachers
from dfkd.training import consistency
from dfkd.training.train import DistillResult, distill
from dfkd.errors import UsageError
from dfkd.data.shards import Pool
from dfkd.teachers.classifier import Classifier
from tests.training.small_run import CLASS_NAMES, settings


class Killed(Exception):
    pass


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return teachers.build(name, len(CLASS_NAMES))


def run(
    out: Path, teacher: str, student: str, said: list[str] | None = None, kill_after: int = 10**9, **changes: Any
) -> DistillResult:
    """A run that dies after so many images."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (12, 3, 32, 32), generator=generator, dtype=torch.uint8)
    data = Pool(images, torch.arange(12) % 3, torch.arange(12), CLASS_NAMES)
    frozen = Classifier(build(teacher), teacher, CLASS_NAMES, 32, (0.5,) * 3, (0.2,) * 3)
    options = settings(**{"steps": 2, "batch_size": 4, "msarc_weight": 3.0, **changes})
    said = [] if said is None else said

    def watch(done: int, total: int) -> None:
        if done >= kill_after:
            raise Killed

    return distill(data, frozen, build(student, 1), options, out, architecture=student, watch=watch, say=said.append)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "last" / "model.safetensors")


@pytest.mark.parametrize(
    ("teacher", "student"),
    [("wrn16_2", "wrn16_1"), ("resnet8x4", "shufflenetv2"), ("vgg8", "mobilenetv2"), ("resnet18", "resnet8_half")],
)
def test_pairs_of_the_zoo(tmp_path: Path, teacher: str, student: str) -> None:
    """Also of unlike sizes: a MobileNetV2 of 1x1 to a VGG of 4x4, a halving stem to a full one."""
    said: list[str] = []
    # BatchNorm over four values, as in that MobileNetV2, has gradients without bounds: they are clipped
    assert run(tmp_path, teacher, student, said, clip_norm=1.0).steps == 2
    assert [line for line in said if line.startswith("mSARC: class activation maps of ") and "Grad-CAMs of " in line]
    assert all(torch.isfinite(value.float()).all() for value in weights(tmp_path).values())


def test_the_weight_and_the_maps_act_and_a_weight_of_0_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, dict[str, Any]] = {"on": {}, "more": {"msarc_weight": 6.0}, "cam": {"msarc_maps": "cam"}}
    given |= {"gradcam": {"msarc_maps": "gradcam"}, "stage": {"msarc_student_stages": ("bn1", "layer1", "layer2")}}
    for name, changes in given.items():
        run(tmp_path / name, "resnet8", "resnet8_half", **changes)
    with monkeypatch.context() as patch:
        for name in ("find", "Consistency", "tapped"):
            patch.setattr(consistency, name, None)  # would fail if called
        run(tmp_path / "off", "resnet8", "resnet8_half", msarc_weight=0.0)
    found = [weights(tmp_path / name)["conv1.weight"] for name in [*given, "off"]]
    assert all(not torch.equal(one, other) for i, one in enumerate(found) for other in found[:i])


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    given: dict[str, Any] = {"checkpoint_every": 1, "steps": 4}
    run(tmp_path / "whole", "resnet8", "resnet8_half", **given)
    with pytest.raises(Killed):
        run(tmp_path / "cut", "resnet8", "resnet8_half", kill_after=8, **given)
    run(tmp_path / "cut", "resnet8", "resnet8_half", **given)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_half_precision_and_networks_without_maps(tmp_path: Path) -> None:
    run(tmp_path / "half", "resnet8", "resnet8_half", amp="bf16")
    assert all(torch.isfinite(value.float()).all() for value in weights(tmp_path / "half").values())
    with pytest.raises(UsageError, match="--cache-logits on: mSARC compares the teacher's feature maps"):
        run(tmp_path / "cached", "resnet8", "resnet8_half", augment="none", cache_logits="on")
    with pytest.raises(UsageError, match="names 'layer4'"):
        run(tmp_path / "named", "resnet8", "resnet8_half", msarc_teacher_stages=("layer1", "layer2", "layer4"))
    assert not (tmp_path / "named").exists()
