"""ShuffleNetV2 1x for 32x32 images (Ma et al., arXiv:1807.11164), names of the RepDistiller zoo (arXiv:1910.10699).

Unlike the paper's, each stage has its downsampling block before, not among, its 3, 7 and 3 plain blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.teachers.resnet import initialise


class PlainBlock(nn.Module):
    """Half of the channels pass, the other half are filtered; then the halves are interleaved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        return _shuffle(kept, F.relu(self.bn3(self.conv3(out))))


class DownBlock(nn.Module):
    """Two filtered branches at half the resolution, interleaved."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(channels, channels, 3, 2, 1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = self.bn4(self.conv4(right))
        return _shuffle(left, F.relu(self.bn5(self.conv5(right))))


class ShuffleNetV2(nn.Module):
    """[B, 3, 32, 32] -> [B, C]."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _stage(24, 116, 3)
        self.layer2 = _stage(116, 232, 7)
        self.layer3 = _stage(232, 464, 3)
        self.conv2 = nn.Conv2d(464, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def _stage(channels: int, width: int, count: int) -> nn.Sequential:
    return nn.Sequential(DownBlock(channels, width), *(PlainBlock(width) for _ in range(count)))


def _shuffle(first: Tensor, second: Tensor) -> Tensor:
    """Channels a1 b1 a2 b2 ..."""
    return torch.stack((first, second), dim=2).flatten(1, 2)
