"""mSARC against a slow reference in float64, its second-order gradient against finite differences, and whole runs."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd import teachers
from dfkd.data import Pool
from dfkd.errors import UsageError
from dfkd.teachers import Classifier
from dfkd.training import distill
from dfkd.training.losses import Objective, Seen
from dfkd.training.msarc import BoundMsarc, Maps, Msarc, grad_cams, msarc_loss
from dfkd.training.step import autocast
from tests.training.small_run import CLASS_NAMES, Killed, dies, equal, run, settings, weights

CLASSES = 4
STAGES = ("stage0", "stage1", "stage2")


class Small(nn.Module):
    """Three stages of falling resolution, a global average and one layer; smooth, so that differences converge."""

    def __init__(self, width: int, seed: int, sides: tuple[int, int, int] = (8, 4, 2)) -> None:
        super().__init__()
        torch.manual_seed(seed)
        channels = (3, width, width + 1, width + 2)
        strides = [before // after for before, after in zip((8, *sides[:2]), sides, strict=True)]
        for index, stride in enumerate(strides):
            convolution = nn.Conv2d(channels[index], channels[index + 1], 3, stride, 1)
            self.add_module(f"stage{index}", nn.Sequential(convolution, nn.BatchNorm2d(channels[index + 1]), nn.Tanh()))
        self.fc = nn.Linear(channels[3], CLASSES)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(std=0.1)
                layer.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stage0(x)))
        return self.fc(x.mean((2, 3)))


def pair(student_sides: tuple[int, int, int] = (8, 4, 2)) -> tuple[Small, Small, Tensor]:
    teacher, student = Small(6, 1).eval().double(), Small(4, 2, student_sides).eval().double()
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return teacher.requires_grad_(False), student, images


def bound(teacher: nn.Module, student: nn.Module, **fields: Any) -> BoundMsarc:
    return Msarc(**fields).bind(teacher, student, 8)


def look(teacher: nn.Module, student: nn.Module, images: Tensor, loss: BoundMsarc, amp: str = "off") -> Seen:
    labels = torch.zeros(len(images), dtype=torch.int64)
    return Objective(teacher, student, [loss], autocast(amp, torch.device("cpu"))).look(student, images, labels)


def loss_of(teacher: nn.Module, student: nn.Module, images: Tensor, **fields: Any) -> Tensor:
    loss = bound(teacher, student, **fields)
    return loss(look(teacher, student, images, loss))


def reference_maps(network: Small, image: Tensor, chosen: int | None) -> tuple[Tensor, list[Tensor], int]:
    """One image, cell by cell: (CAM [C, h, w], Grad-CAMs, first choice), the gradients read by tensor hooks."""
    features, gradients = [], {}
    x = image[None].clone().requires_grad_()
    for name in STAGES:
        x = network.get_submodule(name)(x)
        x.register_hook(lambda gradient, name=name: gradients.__setitem__(name, gradient))
        features.append(x)
    logits = network.fc(x.mean((2, 3)))[0]
    first = int(logits.argmax())
    logits[first if chosen is None else chosen].backward()
    last, weight = features[-1][0].detach(), network.fc.weight.detach()
    cam = torch.zeros(CLASSES, *last.shape[1:], dtype=last.dtype)
    for label in range(CLASSES):
        for channel in range(len(last)):
            cam[label] += weight[label, channel] * last[channel]
    found = []
    for name, feature in zip(STAGES, features, strict=True):
        total = torch.zeros(feature.shape[2:], dtype=last.dtype)
        for channel in range(feature.shape[1]):
            total += gradients[name][0, channel].mean() * feature[0, channel].detach()
        found.append(total)
    network.zero_grad()
    return cam, found, first


def test_the_loss_is_the_reference_image_by_image() -> None:
    teacher, student, images = pair()
    cams: list[Tensor] = []
    grads: list[list[Tensor]] = [[] for _ in STAGES]
    for image in images:
        cam_t, found_t, first = reference_maps(teacher, image, None)
        cam_s, found_s, _ = reference_maps(student, image, first)
        cams.append((cam_s - cam_t).square())
        for into, mine, theirs in zip(grads, found_s, found_t, strict=True):
            into.append((mine - theirs).square())
    wanted = torch.stack(cams).mean() + torch.stack([torch.stack(part).mean() for part in grads]).sum()
    places = bound(teacher, student)
    assert places.theirs.stages == STAGES and places.ours.head is not None and places.ours.head.last == "stage2"
    torch.testing.assert_close(loss_of(teacher, student, images), wanted, rtol=1e-12, atol=0)
    parts = [loss_of(teacher, student, images, maps=maps) for maps in ("cam", "gradcam")]
    torch.testing.assert_close(parts[0] + parts[1], wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sides", [(8, 4, 2), (4, 2, 1)])
@pytest.mark.parametrize("training", [False, True])
def test_the_gradient_is_that_of_finite_differences(sides: tuple[int, int, int], training: bool) -> None:
    teacher, student, images = pair(sides)
    student.train(training)
    parameters = [value for name, value in student.named_parameters() if name != "fc.bias"]  # which no map has
    generator = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        return loss_of(teacher, student, images, student_stages=STAGES)

    gradient = torch.autograd.grad(loss(), parameters)
    for index, parameter in enumerate(parameters):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-5 * direction)
            values.append(loss().item())
            with torch.no_grad():
                parameter.sub_(sign * 1e-5 * direction)
        slope = (values[0] - values[1]) / 2e-5
        # central differences: their own error is of the order of 1e-10, plus rounding 1e-16 / 1e-5
        assert float((gradient[index] * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-9), index


def test_maps_of_two_sizes_meet_at_the_smaller_one() -> None:
    """Averages of class activation maps and sums of Grad-CAMs stay what they are, whichever side is larger."""
    generator = torch.Generator().manual_seed(0)
    cam, grad = torch.randn(2, 5, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    small = Maps(cam, (grad,))
    tiles = cam.repeat_interleave(2, 2).repeat_interleave(2, 3)
    spread = Maps(tiles, (grad.repeat_interleave(4, 1).repeat_interleave(3, 2) / 12,))
    shifted = Maps(cam + 1, (grad + 2,))
    for one, other in ((small, spread), (spread, small)):
        assert float(msarc_loss(one, other)) < 1e-12  # float32, squared
    for one, other in ((shifted, spread), (spread, shifted)):
        torch.testing.assert_close(msarc_loss(one, other), torch.tensor(1.0 + 4.0))
    tall, wide = Maps(torch.ones(1, 1, 8, 2), ()), Maps(torch.zeros(1, 1, 2, 8), ())
    assert float(msarc_loss(tall, wide)) == 1.0


def test_the_teacher_answers_as_ever_and_gets_no_gradient() -> None:
    teacher, student, images = pair()
    plain, loss = teacher(images), bound(teacher, student)
    seen = look(teacher, student, images, loss)
    assert torch.equal(seen.teacher, plain) and not seen.teacher.requires_grad
    assert not any(value.requires_grad for value in seen.teacher_maps.values())
    loss(seen).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for name, parameter in student.named_parameters() if name != "fc.bias")


def test_an_activation_in_place_behind_a_stage() -> None:
    """Autograd forbids it on the first tensor of a graph, and the maps are then those behind it."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    stages = {f"{who}_stages": ("0", "2") for who in ("teacher", "student")}
    assert loss_of(copy.deepcopy(network).requires_grad_(False), network, images, **stages).item() == 0


def test_gradients_below_float16_are_kept() -> None:
    """A mean over many cells makes them small: 4e-8 here, which float16 rounds to 6e-8 or 0 without the scale."""
    features = torch.full((1, 2, 4, 4), 3.0, dtype=torch.float16, requires_grad=True)
    logits = (features * torch.tensor([4e-5, 2e-5]).half().view(1, 2, 1, 1)).mean((2, 3)) * 0.01
    (found,) = grad_cams(logits, torch.tensor([0]), [features], create_graph=False)
    assert found.dtype == torch.float32 and float(found.mean()) == pytest.approx(3 * 4e-5 * 0.01 / 16, rel=0.05)


def test_under_autocast_the_loss_is_float32() -> None:
    teacher, student, images = (value.float() for value in pair())
    loss, wanted = bound(teacher, student), loss_of(teacher, student, images)
    found = loss(look(teacher, student, images, loss, "bf16"))
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=0.05)  # 8 bits: 0.4 % an operation, a dozen of them
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def zoo_run(out: Path, teacher: str, student: str, progress: Any = None, **changes: Any) -> list[str]:
    """What a distillation between two networks of the zoo tells."""
    torch.manual_seed(0)
    frozen = Classifier(teachers.build(teacher, 3), CLASS_NAMES, (0.5,) * 3, (0.2,) * 3, 32, teacher)  # type: ignore[arg-type]
    pixels = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    data = Pool(pixels, torch.arange(12) % 3, torch.arange(12), CLASS_NAMES)
    said: list[str] = []
    config = settings(**{"student": student, "steps": 2, "batch_size": 4, "msarc_weight": 3.0, **changes})
    run(out, config, data=data, teacher=frozen, student=None, progress=progress, say=said.append)
    return said


@pytest.mark.parametrize(("teacher", "student"), [("wrn16_2", "shufflenetv2"), ("vgg8", "mobilenetv2")])
def test_pairs_of_the_zoo(tmp_path: Path, teacher: str, student: str) -> None:
    """Also of unlike sizes: a MobileNetV2 of 1x1 to a VGG of 4x4, a halving stem to a full one."""
    # BatchNorm over four values, as in that MobileNetV2, has gradients without bounds: they are clipped
    said = zoo_run(tmp_path, teacher, student, clip_norm=1.0)
    assert any("3 mSARC (class activation maps of " in line and "Grad-CAMs of " in line for line in said)
    assert all(torch.isfinite(value.float()).all() for value in weights(tmp_path / "last").values())


def test_the_weight_and_the_maps_act_and_a_weight_of_0_looks_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, dict[str, Any]] = {"on": {}, "more": {"msarc_weight": 6.0}, "cam": {"msarc_maps": "cam"}}
    given |= {"gradcam": {"msarc_maps": "gradcam"}, "stage": {"msarc_student_stages": ("bn1", "layer1", "layer2")}}
    given |= {"theirs": {"msarc_teacher_stages": ("bn1", "layer1", "layer2")}, "half": {"amp": "bf16"}}
    for name, changes in given.items():
        zoo_run(tmp_path / name, "resnet8", "resnet8_half", **changes)
    monkeypatch.setattr(distill, "Msarc", None)  # would fail if used
    zoo_run(tmp_path / "off", "resnet8", "resnet8_half", msarc_weight=0.0)
    found = [weights(tmp_path / name / "last")["conv1.weight"] for name in [*given, "off"]]
    assert all(not torch.equal(one, other) for i, one in enumerate(found) for other in found[:i])


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    given: dict[str, Any] = {"checkpoint_every": 1, "steps": 4}
    zoo_run(tmp_path / "whole", "resnet8", "resnet8_half", **given)
    with pytest.raises(Killed):
        zoo_run(tmp_path / "cut", "resnet8", "resnet8_half", progress=dies(2), **given)
    zoo_run(tmp_path / "cut", "resnet8", "resnet8_half", **given)
    assert equal(tmp_path / "whole/last", tmp_path / "cut/last")


def test_networks_without_these_maps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names 'layer4'"):
        zoo_run(tmp_path, "resnet8", "resnet8_half", msarc_teacher_stages=("layer1", "layer2", "layer4"))
    with pytest.raises(UsageError, match="2 stages of the teacher and 3 of the student"):
        zoo_run(tmp_path, "resnet8", "resnet8_half", msarc_teacher_stages=("layer1", "layer2"))
    assert not (tmp_path / "checkpoint.pt").exists()
