"""Networks to learn from and to teach: the CIFAR zoo by name, other libraries' networks by prefix."""

import difflib
from collections.abc import Callable

from torch import nn

from dfkd.errors import UsageError
from dfkd.teachers import adapters
from dfkd.teachers.classifier import Classifier
from dfkd.teachers.mobilenetv2 import MobileNetV2
from dfkd.teachers.resnet import CifarResNet, ImageNetResNet
from dfkd.teachers.resnet_thin import resnet8_half, resnet_thin
from dfkd.teachers.shufflenetv2 import ShuffleNetV2
from dfkd.teachers.vgg import VGG
from dfkd.teachers.wrn import WideResNet

__all__ = ["Classifier", "build", "input_size", "names"]

ZOO: dict[str, Callable[[int], nn.Module]] = {
    "wrn16_1": lambda classes: WideResNet(16, 1, classes),
    "wrn16_2": lambda classes: WideResNet(16, 2, classes),
    "wrn40_1": lambda classes: WideResNet(40, 1, classes),
    "wrn40_2": lambda classes: WideResNet(40, 2, classes),
    "resnet8": lambda classes: resnet_thin(8, 1, classes),
    "resnet8_half": resnet8_half,
    "resnet20": lambda classes: resnet_thin(20, 1, classes),
    "resnet32": lambda classes: resnet_thin(32, 1, classes),
    "resnet56": lambda classes: resnet_thin(56, 1, classes),
    "resnet110": lambda classes: resnet_thin(110, 1, classes),
    "resnet8x4": lambda classes: resnet_thin(8, 4, classes),
    "resnet32x4": lambda classes: resnet_thin(32, 4, classes),
    "resnet18": lambda classes: CifarResNet(18, classes),
    "resnet34": lambda classes: CifarResNet(34, classes),
    "resnet50": lambda classes: CifarResNet(50, classes),
    "resnet18_imagenet": lambda classes: ImageNetResNet(18, classes),
    "resnet34_imagenet": lambda classes: ImageNetResNet(34, classes),
    "resnet50_imagenet": lambda classes: ImageNetResNet(50, classes),
    "vgg8": lambda classes: VGG(8, classes),
    "vgg11": lambda classes: VGG(11, classes),
    "vgg13": lambda classes: VGG(13, classes),
    "mobilenetv2": MobileNetV2,
    "shufflenetv2": ShuffleNetV2,
}


def names() -> tuple[str, ...]:
    """The architectures of the zoo; beside them, `timm:`, `torchvision:`, `transformers:` and `file:` names work."""
    return tuple(ZOO)


def build(name: str, num_classes: int) -> nn.Module:
    """An untrained network: normalised images [B, 3, h, w] -> logits [B, num_classes].

    Its weights come from torch's global generator. Raises UsageError for an unknown name.
    """
    check(name)
    if adapters.handles(name):
        return adapters.build(name, num_classes)
    return ZOO[name](num_classes)


def input_size(name: str) -> int:
    """The side in pixels that the architecture is made for. Raises UsageError for an unknown name."""
    check(name)
    if adapters.handles(name):
        return adapters.input_size(name)
    return 224 if name.endswith("_imagenet") else 32


def check(name: str) -> None:
    """Raises UsageError, naming the nearest known names, unless build() knows the architecture."""
    if name in ZOO or adapters.handles(name):
        return
    near = difflib.get_close_matches(name, ZOO, n=3) or list(ZOO)
    prefixes = ", ".join(f"{prefix}:" for prefix in adapters.PREFIXES)
    raise UsageError(
        f"unknown architecture '{name}'",
        f"nearest known: {', '.join(near)}",
        f"choose one of them or one of another library, by the prefix {prefixes}",
    )
