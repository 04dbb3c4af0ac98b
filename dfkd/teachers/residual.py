"""Residual blocks (He et al., arXiv:1512.03385), activation after the sum.

Parameter names follow the published checkpoints, which name the projection either `downsample` or `shortcut`.
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
    """depth blocks, the first of which changes size and channels."""
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
