"""Wide residual networks for 32x32 images (Zagoruyko and Komodakis, arXiv:1605.07146), activation before convolution.

Names follow the zoo of arXiv:1905.09768 (wresnet), from which the CIFAR checkpoints descend.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.teachers.resnet import initialise


class PreactBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU; a block that changes the width projects the activation."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.convShortcut = None if channels == width else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        kept = x if self.convShortcut is None else self.convShortcut(active)
        out: Tensor = kept + self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out


class Stage(nn.Module):
    """`layer`: count blocks, the first of which changes size and width."""

    def __init__(self, count: int, channels: int, width: int, stride: int) -> None:
        super().__init__()
        rest = [PreactBlock(width, width, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(PreactBlock(channels, width, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """depth = 6 n + 4, n blocks a stage; stages of 16k, 32k, 64k channels. [B, 3, 32, 32] -> [B, C]."""

    def __init__(self, depth: int, widen: int, num_classes: int) -> None:
        super().__init__()
        count = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = Stage(count, 16, 16 * widen, 1)
        self.block2 = Stage(count, 16 * widen, 32 * widen, 2)
        self.block3 = Stage(count, 32 * widen, 64 * widen, 2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        logits: Tensor = self.fc(F.relu(self.bn1(x)).mean((2, 3)))
        return logits
