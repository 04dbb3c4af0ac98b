"""mSARC against a slow reference in float64, its second-order gradient against finite differences."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dfkd.training.consistency import Consistency, compared
from dfkd.training.msarc import Maps, class_activation_maps, grad_cams, msarc_loss
from tests.training.small_run import settings

CLASSES = 4


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


STAGES = ("stage0", "stage1", "stage2")


def pair(student_sides: tuple[int, int, int] = (8, 4, 2)) -> tuple[Small, Small, Tensor]:
    teacher, student = Small(6, 1).eval().double(), Small(4, 2, student_sides).eval().double()
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return teacher, student, images


def compare(teacher: nn.Module, student: nn.Module, size: int = 8, **changes: object) -> Consistency:
    options = settings(**{"msarc_weight": 1.0, **changes})
    places = compared(teacher, student, size, options)
    assert places is not None
    return Consistency(teacher, student, places, options.msarc_weight)


def loss_of(teacher: nn.Module, student: nn.Module, images: Tensor, **changes: object) -> Tensor:
    both = compare(teacher, student, **changes)
    return both.loss(both.look(teacher, student, images))


def reference_maps(network: Small, image: Tensor, chosen: int | None) -> tuple[Tensor, list[Tensor], int]:
    """One image, cell by cell: (CAM [C, h, w], Grad-CAMs, first choice), the gradients read by tensor hooks."""
    features, gradients = [], {}
    x = image[None]
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
    cams, grads = [], [[] for _ in STAGES]
    for image in copy.deepcopy(images):
        cam_t, found_t, first = reference_maps(teacher, image, None)
        cam_s, found_s, _ = reference_maps(student, image, first)
        cams.append((cam_s - cam_t).square())
        for into, mine, theirs in zip(grads, found_s, found_t, strict=True):
            into.append((mine - theirs).square())
    wanted = torch.stack(cams).mean() + sum(torch.stack(part).mean() for part in grads)
    both = compare(teacher, student)
    assert both.places.teacher.stages == STAGES and both.places.student.head.last == "stage2"
    torch.testing.assert_close(both.loss(both.look(teacher, student, images)), wanted, rtol=1e-12, atol=0)
    parts = [loss_of(teacher, student, images, msarc_maps=maps) for maps in ("cam", "gradcam")]
    torch.testing.assert_close(sum(parts), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss_of(teacher, student, images, msarc_weight=2.5), 2.5 * wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sides", [(8, 4, 2), (4, 2, 1)])
@pytest.mark.parametrize("training", [False, True])
def test_the_gradient_is_that_of_finite_differences(sides: tuple[int, int, int], training: bool) -> None:
    teacher, student, images = pair(sides)
    student.train(training)
    both = compare(teacher, student, msarc_student_stages=STAGES)
    parameters = [value for name, value in student.named_parameters() if name != "fc.bias"]  # which no map has
    generator = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        return both.loss(both.look(teacher, student, images))

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


def test_the_grad_cam_of_the_last_map_is_its_share_of_the_class_activation_map() -> None:
    network, _, images = pair()
    features = network.stage2(network.stage1(network.stage0(images)))
    logits = network.fc(features.mean((2, 3)))
    classes = torch.tensor([2, 0, 3])
    cam = class_activation_maps(features, network.fc.weight)
    (found,) = grad_cams(logits, classes, [features], create_graph=True)
    cells = cam.shape[2] * cam.shape[3]
    torch.testing.assert_close(found, cam[torch.arange(3), classes] / cells, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(cam.mean((2, 3)) + network.fc.bias, logits, rtol=1e-12, atol=1e-14)


def test_maps_of_two_sizes_meet_at_the_smaller_one() -> None:
    """Averages of class activation maps and sums of Grad-CAMs stay what they are, whichever side is larger."""
    generator = torch.Generator().manual_seed(0)
    cam, grad = torch.randn(2, 5, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    small = Maps(cam, (grad,))
    tiles = cam.repeat_interleave(2, 2).repeat_interleave(2, 3)
    spread = Maps(tiles, (grad.repeat_interleave(4, 1).repeat_interleave(3, 2) / 12,))
    for one, other in ((small, spread), (spread, small)):
        assert float(msarc_loss(one, other)) < 1e-12  # float32, squared
    shifted = Maps(cam + 1, (grad + 2,))
    for one, other in ((shifted, spread), (spread, shifted)):
        torch.testing.assert_close(msarc_loss(one, other), torch.tensor(1.0 + 4.0))
    tall, wide = Maps(torch.ones(1, 1, 8, 2), ()), Maps(torch.zeros(1, 1, 2, 8), ())
    assert float(msarc_loss(tall, wide)) == 1.0


def test_the_teacher_answers_as_ever_and_gets_no_gradient() -> None:
    teacher, student, images = pair()
    with torch.no_grad():
        plain = teacher(images)
    both = compare(teacher, student)
    with torch.no_grad():  # as around a teacher in a step: the maps' graph is made nevertheless
        seen = both.look(teacher, lambda x: student(x), images)
    assert torch.equal(seen.teacher, plain) and not seen.teacher.requires_grad
    seen = both.look(teacher, student, images)
    both.loss(seen).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for name, parameter in student.named_parameters() if name != "fc.bias")
    assert not teacher._forward_hooks and not teacher.stage0._forward_hooks and not student.stage2._forward_hooks


def test_an_activation_in_place_behind_a_stage() -> None:
    """Autograd forbids it on the first tensor of a graph, and the maps are then those behind it."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    changes = {f"msarc_{who}_stages": ("0", "2") for who in ("teacher", "student")}
    assert loss_of(copy.deepcopy(network), network, images, **changes).item() == 0


def test_gradients_below_float16_are_kept() -> None:
    """A mean over many cells makes them small: 4e-8 here, which float16 rounds to 6e-8 or 0 without the scale."""
    features = torch.full((1, 2, 4, 4), 3.0, dtype=torch.float16, requires_grad=True)
    logits = (features * torch.tensor([4e-5, 2e-5]).half().view(1, 2, 1, 1)).mean((2, 3)) * 0.01
    (found,) = grad_cams(logits, torch.tensor([0]), [features], create_graph=False)
    wanted = 3 * 4e-5 * 0.01 / 16
    torch.testing.assert_close(found, torch.full((1, 4, 4), wanted), rtol=2e-2, atol=0)


def test_half_precision_looks_at_the_same_places() -> None:
    teacher, student, images = pair()
    wanted = loss_of(teacher, student, images)
    teacher, student, images = teacher.float(), student.float(), images.float()
    both = compare(teacher, student)
    with torch.autocast("cpu", torch.bfloat16):
        seen = both.look(teacher, student, images)
    loss = both.loss(seen)
    loss.backward()
    assert seen.student.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=0.05)  # 8 bits: 0.4 % an operation, a dozen of them
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_descent_brings_the_maps_together() -> None:
    teacher, student, images = pair((8, 4, 2))
    student.train()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
    losses = []
    for _ in range(60):
        loss = loss_of(teacher, student, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
