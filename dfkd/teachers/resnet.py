"""Residual networks (He et al., arXiv:1512.03385), activation after the sum.

ThinResNet      three stages for 32x32 images (their section 4.2); names of the RepDistiller zoo (arXiv:1910.10699)
CifarResNet     four stages behind a 3x3 stem at full resolution; names of the DAFL zoo (arXiv:1904.01186)
ImageNetResNet  four stages behind a 7x7 stem and pooling, a quarter of the resolution; names of torchvision

Published checkpoints name a block's projection either `downsample` or `shortcut`.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; planes channels out."""

    expansion = 1

    def __init__(self, channels: int, planes: int, stride: int, projection: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.projection = projection
        self.add_module(projection, _project(channels, planes * self.expansion, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.get_submodule(self.projection)(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride), 1x1; 4 planes channels out."""

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int, projection: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.projection = projection
        self.add_module(projection, _project(channels, planes * self.expansion, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.get_submodule(self.projection)(x))


def stage(
    block: type[BasicBlock] | type[Bottleneck], channels: int, planes: int, depth: int, stride: int, projection: str
) -> nn.Sequential:
    """`depth` blocks, the first of which changes size and channels."""
    width = planes * block.expansion
    rest = [block(width, planes, 1, projection) for _ in range(depth - 1)]
    return nn.Sequential(block(channels, planes, stride, projection), *rest)


def initialise(network: nn.Module) -> None:
    """He normal convolutions over the fan out; BatchNorm starts at one and zero by itself."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _project(channels: int, width: int, stride: int) -> nn.Module:
    if stride == 1 and channels == width:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))


class ThinResNet(nn.Module):
    """depth = 6 n + 2, n blocks a stage; widths of the stem and the three stages. [B, 3, 32, 32] -> [B, C].

    stem: kernel and stride of the first convolution.
    """

    def __init__(
        self, depth: int, widths: tuple[int, int, int, int], num_classes: int, stem: tuple[int, int] = (3, 1)
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        kernel, stride = stem
        self.conv1 = nn.Conv2d(3, widths[0], kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = stage(BasicBlock, widths[0], widths[1], blocks, 1, "downsample")
        self.layer2 = stage(BasicBlock, widths[1], widths[2], blocks, 2, "downsample")
        self.layer3 = stage(BasicBlock, widths[2], widths[3], blocks, 2, "downsample")
        self.fc = nn.Linear(widths[3], num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def resnet_thin(depth: int, width: int, num_classes: int) -> ThinResNet:
    """width 1: stem and stages of 16, 16, 32, 64 channels; width k > 1: 32 and 16k, 32k, 64k (resnet8x4)."""
    stem = 16 if width == 1 else 32
    return ThinResNet(depth, (stem, 16 * width, 32 * width, 64 * width), num_classes)


def resnet8_half(num_classes: int) -> ThinResNet:
    """The demo's network for CPUs, ours: a stem that halves the resolution, and wider layers.

    An image takes 7.2 M multiplications where resnet8 takes 12.5 M.
    """
    return ThinResNet(8, (24, 24, 48, 96), num_classes, stem=(5, 2))


BlockType = type[BasicBlock] | type[Bottleneck]

DEPTHS: dict[int, tuple[BlockType, tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


class _FourStages(nn.Module):
    """layer1 to layer4: 64 channels in, 512 * expansion out, an eighth of the resolution."""

    def __init__(self, depth: int, projection: str) -> None:
        super().__init__()
        block, counts = DEPTHS[depth]
        channels = 64
        for index, count in enumerate(counts):
            planes = 64 * 2**index
            stride = 1 if index == 0 else 2
            self.add_module(f"layer{index + 1}", stage(block, channels, planes, count, stride, projection))
            channels = planes * block.expansion
        self.width = channels

    def stages(self, x: Tensor) -> Tensor:
        for index in range(1, 5):
            x = self.get_submodule(f"layer{index}")(x)
        return x


class CifarResNet(_FourStages):
    """[B, 3, 32, 32] -> [B, C]."""

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__(depth, "shortcut")
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.linear = nn.Linear(self.width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class ImageNetResNet(_FourStages):
    """[B, 3, 224, 224] -> [B, C]."""

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__(depth, "downsample")
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(self.width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.stages(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits
