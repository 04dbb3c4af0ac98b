"""The zoo: state-dict keys of the published checkpoints, written down again here, and the published sizes."""

import re

import pytest
import torch

from dfkd import teachers
from dfkd.errors import UsageError
from dfkd.teachers.classifier import Classifier

BN = "{weight,bias,running_mean,running_var,num_batches_tracked}"


def expand(pattern: str) -> set[str]:
    """Braces as in a shell: a{b,c} -> ab, ac; {0..2} -> 0, 1, 2."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return {pattern}
    first, dots, last = found[1].partition("..")
    choices = [str(i) for i in range(int(first), int(last) + 1)] if dots else found[1].split(",")
    return set().union(*(expand(pattern[: found.start()] + choice + pattern[found.end() :]) for choice in choices))


def wrn(blocks: int, widen: int) -> list[str]:
    return [
        "conv1.weight",
        f"block{{1,2,3}}.layer.{{0..{blocks - 1}}}.bn{{1,2}}.{BN}",
        f"block{{1,2,3}}.layer.{{0..{blocks - 1}}}.conv{{1,2}}.weight",
        f"block{'{2,3}' if widen == 1 else '{1,2,3}'}.layer.0.convShortcut.weight",
        f"bn1.{BN}",
        "fc.{weight,bias}",
    ]


def thin(blocks: int, widen: int) -> list[str]:
    projected = "{2,3}" if widen == 1 else "{1,2,3}"
    return [
        "conv1.weight",
        f"bn1.{BN}",
        f"layer{{1,2,3}}.{{0..{blocks - 1}}}.conv{{1,2}}.weight",
        f"layer{{1,2,3}}.{{0..{blocks - 1}}}.bn{{1,2}}.{BN}",
        f"layer{projected}.0.downsample.0.weight",
        f"layer{projected}.0.downsample.1.{BN}",
        "fc.{weight,bias}",
    ]


def four_stages(depth: int, projection: str, head: str) -> list[str]:
    inner = "{1,2,3}" if depth == 50 else "{1,2}"
    last = (1, 1, 1, 1) if depth == 18 else (2, 3, 5, 2)
    projected = "{1,2,3,4}" if depth == 50 else "{2,3,4}"
    blocks = [f"layer{stage + 1}.{{0..{end}}}" for stage, end in enumerate(last)]
    return [
        "conv1.weight",
        f"bn1.{BN}",
        *(f"{block}.conv{inner}.weight" for block in blocks),
        *(f"{block}.bn{inner}.{BN}" for block in blocks),
        f"layer{projected}.0.{projection}.0.weight",
        f"layer{projected}.0.{projection}.1.{BN}",
        head + ".{weight,bias}",
    ]


def vgg(doubled: str) -> list[str]:
    """Every block starts with convolution 0 and BatchNorm 1; the doubled ones go on with 3 and 4 behind a ReLU."""
    more = [f"block{doubled}.3.{{weight,bias}}", f"block{doubled}.4.{BN}"] if doubled else []
    return ["block{0..4}.0.{weight,bias}", f"block{{0..4}}.1.{BN}", *more, "classifier.{weight,bias}"]


MOBILENET = [
    "features.{0,18}.0.weight",
    f"features.{{0,18}}.1.{BN}",
    "features.1.conv.{0.0,1}.weight",  # no expansion in the first block
    f"features.1.conv.{{0.1,2}}.{BN}",
    "features.{2..17}.conv.{0.0,1.0,2}.weight",
    f"features.{{2..17}}.conv.{{0.1,1.1,3}}.{BN}",
    "classifier.1.{weight,bias}",
]

SHUFFLENET = [
    "conv{1,2}.weight",
    f"bn{{1,2}}.{BN}",
    "layer{1,2,3}.0.conv{1..5}.weight",
    f"layer{{1,2,3}}.0.bn{{1..5}}.{BN}",
    "layer{1,3}.{1..3}.conv{1..3}.weight",
    f"layer{{1,3}}.{{1..3}}.bn{{1..3}}.{BN}",
    "layer2.{1..7}.conv{1..3}.weight",
    f"layer2.{{1..7}}.bn{{1..3}}.{BN}",
    "linear.{weight,bias}",
]

# Name -> key patterns, trainable parameters with 10 classes.
PUBLISHED = {
    "wrn16_1": (wrn(2, 1), 175_066),
    "wrn16_2": (wrn(2, 2), 691_674),
    "wrn40_1": (wrn(6, 1), 563_930),
    "wrn40_2": (wrn(6, 2), 2_243_546),
    "resnet8": (thin(1, 1), 78_042),
    "resnet20": (thin(3, 1), 272_474),
    "resnet32": (thin(5, 1), 466_906),
    "resnet56": (thin(9, 1), 855_770),
    "resnet110": (thin(18, 1), 1_730_714),
    "resnet8x4": (thin(1, 4), 1_210_410),
    "resnet32x4": (thin(5, 4), 7_410_730),
    "resnet18": (four_stages(18, "shortcut", "linear"), 11_173_962),
    "resnet34": (four_stages(34, "shortcut", "linear"), 21_282_122),
    "resnet50": (four_stages(50, "shortcut", "linear"), 23_520_842),
    "resnet18_imagenet": (four_stages(18, "downsample", "fc"), 11_181_642),
    "resnet34_imagenet": (four_stages(34, "downsample", "fc"), 21_289_802),
    "resnet50_imagenet": (four_stages(50, "downsample", "fc"), 23_528_522),
    "vgg8": (vgg(""), 3_918_858),
    "vgg11": (vgg("{2,3,4}"), 9_231_114),
    "vgg13": (vgg("{0..4}"), 9_416_010),
    "mobilenetv2": (MOBILENET, 2_236_682),
    "shufflenetv2": (SHUFFLENET, 1_263_278),
}

# One shape per family where the names alone would not tell a wrong layer; resnet*_imagenet with 1000 classes is
# torchvision's own count of 11 689 512, 21 797 672 and 25 557 032 parameters.
SHAPES = {
    "wrn16_2": {"block1.layer.0.convShortcut.weight": (32, 16, 1, 1), "block3.layer.0.bn1.weight": (64,)},
    "resnet8x4": {"conv1.weight": (32, 3, 3, 3), "layer1.0.downsample.0.weight": (64, 32, 1, 1)},
    "resnet18": {"conv1.weight": (64, 3, 3, 3), "linear.weight": (10, 512)},
    "resnet50": {"layer1.0.shortcut.0.weight": (256, 64, 1, 1), "linear.weight": (10, 2048)},
    "resnet34_imagenet": {"conv1.weight": (64, 3, 7, 7)},
    "vgg11": {"block2.3.weight": (256, 256, 3, 3), "classifier.weight": (10, 512)},
    "mobilenetv2": {"features.2.conv.1.0.weight": (96, 1, 3, 3), "features.18.0.weight": (1280, 320, 1, 1)},
    "shufflenetv2": {"conv1.weight": (24, 3, 1, 1), "layer1.0.conv1.weight": (24, 1, 3, 3), "bn2.bias": (1024,)},
}


def on_meta(name: str, num_classes: int = 10) -> torch.nn.Module:
    with torch.device("meta"):
        return teachers.build(name, num_classes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_sizes_of_the_published_checkpoints(name):
    patterns, parameters = PUBLISHED[name]
    network = on_meta(name)
    state = network.state_dict()
    expected = set().union(*map(expand, patterns))
    assert set(state) == expected
    assert sum(weight.numel() for weight in network.parameters()) == parameters
    for key, shape in SHAPES.get(name, {}).items():
        assert tuple(state[key].shape) == shape


@pytest.mark.parametrize(
    "name, parameters",
    [("resnet18_imagenet", 11_689_512), ("resnet34_imagenet", 21_797_672), ("resnet50_imagenet", 25_557_032)],
)
def test_imagenet_sizes_are_torchvisions(name, parameters):
    assert sum(weight.numel() for weight in on_meta(name, 1000).parameters()) == parameters


@pytest.mark.parametrize("name", teachers.names())
def test_logits(name):
    network = on_meta(name, 7)
    size = teachers.input_size(name)
    assert network(torch.empty(2, 3, size, size, device="meta")).shape == (2, 7)


def test_every_published_network_is_in_the_zoo():
    assert set(PUBLISHED) | {"resnet8_half"} == set(teachers.names())


@pytest.mark.parametrize("name", ["wrn16_1", "resnet8", "resnet8_half", "vgg8", "shufflenetv2"])
def test_an_image_is_classified_alone(name):
    """In evaluation mode a row of the batch does not depend on the others."""
    torch.manual_seed(0)
    network = teachers.build(name, 5).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        together, alone = network(images), network(images[1:2])
    assert together.isfinite().all()
    # The only difference is the order of float32 sums in convolutions of other shapes.
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


def test_unknown_name_names_the_nearest():
    with pytest.raises(UsageError, match="wrn40_2"):
        teachers.build("wrn-40-2", 10)
    with pytest.raises(UsageError, match="prefix"):
        teachers.build("caffe:alexnet", 10)


def classifier(size: int = 32) -> Classifier:
    network = teachers.build("resnet8", 3).eval()
    return Classifier(network, "resnet8", ("a", "b", "c"), size, (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))


def test_prepare_normalises_and_keeps_the_right_size_untouched():
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    prepared = classifier().prepare(images)
    expected = torch.stack([(images[:, 0] - 0.1) / 0.5, (images[:, 1] - 0.2) / 0.25, (images[:, 2] - 0.3) / 2], dim=1)
    torch.testing.assert_close(prepared, expected, rtol=0, atol=1e-12)


def test_prepare_resizes_differentiably():
    images = torch.rand(1, 3, 48, 40, requires_grad=True)
    prepared = classifier().prepare(images)
    assert prepared.shape == (1, 3, 32, 32)
    prepared.square().sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_batch_norms_in_definition_order():
    one = classifier()
    layers = one.batch_norms()
    assert len(layers) == 9
    assert layers[0] is one.module.bn1
