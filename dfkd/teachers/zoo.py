"""Architectures by name: the CIFAR zoo that published checkpoints descend from, and other libraries' by prefix."""

import difflib
from collections.abc import Callable
from functools import partial

from torch import nn

from dfkd.errors import UsageError
from dfkd.teachers import adapters
from dfkd.teachers.mobilenetv2 import MobileNetV2
from dfkd.teachers.resnet import CifarResNet, ImageNetResNet, resnet8_half, resnet_thin
from dfkd.teachers.shufflenetv2 import ShuffleNetV2
from dfkd.teachers.vgg import VGG
from dfkd.teachers.wrn import WideResNet

# Name -> function of the number of classes.
ZOO: dict[str, Callable[[int], nn.Module]] = {
    **{f"wrn{depth}_{widen}": partial(WideResNet, depth, widen) for depth in (16, 40) for widen in (1, 2)},
    **{f"resnet{depth}": partial(resnet_thin, depth, 1) for depth in (8, 20, 32, 56, 110)},
    "resnet8_half": resnet8_half,
    "resnet8x4": partial(resnet_thin, 8, 4),
    "resnet32x4": partial(resnet_thin, 32, 4),
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (18, 34, 50)},
    **{f"resnet{depth}_imagenet": partial(ImageNetResNet, depth) for depth in (18, 34, 50)},
    **{f"vgg{depth}": partial(VGG, depth) for depth in (8, 11, 13)},
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
    return adapters.build(name, num_classes) if adapters.handles(name) else ZOO[name](num_classes)


def input_size(name: str) -> int:
    """The side in pixels that the architecture is made for. Raises UsageError for an unknown name."""
    check(name)
    if adapters.handles(name):
        return adapters.input_size(name)
    return 224 if name.endswith("_imagenet") else 32


def check(name: str) -> None:
    """Raise UsageError, naming the nearest known names or the absent library, unless build() knows the architecture."""
    if adapters.handles(name):
        adapters.check(name)
    if name in ZOO or adapters.handles(name):
        return
    near = difflib.get_close_matches(name, ZOO, n=3) or list(ZOO)
    prefixes = ", ".join(f"{prefix}:" for prefix in adapters.PREFIXES)
    raise UsageError(
        f"unknown architecture '{name}'",
        f"nearest known: {', '.join(near)}",
        f"choose one of them, or one of another library by the prefix {prefixes}",
    )
