"""The four-stage ResNets (He et al., arXiv:1512.03385) with either stem.

CifarResNet   3x3 stem at full resolution; names of the DAFL zoo (arXiv:1904.01186): `shortcut`, `linear`.
ImageNetResNet  7x7 stem and pooling, a quarter of the resolution; names of torchvision: `downsample`, `fc`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.teachers.residual import BasicBlock, Bottleneck, initialise, stage

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
