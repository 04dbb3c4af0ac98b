"""The three-stage ResNets for 32x32 images (He et al., arXiv:1512.03385, section 4.2), with a 1x1 projection.

Names follow the RepDistiller zoo (arXiv:1910.10699), from which the checkpoints of resnet8 to resnet110, resnet8x4 and
resnet32x4 descend. resnet8_half is ours, for the demo on CPUs: its stem halves the resolution, so that it takes 7.2 M
multiplications an image where resnet8 takes 12.5 M, and wider layers use the CPU better.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.teachers.residual import BasicBlock, initialise, stage


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
    return ThinResNet(8, (24, 24, 48, 96), num_classes, stem=(5, 2))
