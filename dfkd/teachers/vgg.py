"""VGG with BatchNorm and one linear layer, for 32x32 images (Simonyan and Zisserman, arXiv:1409.1556).

Names and pooling follow the RepDistiller zoo (arXiv:1910.10699): block0 to block4 and `classifier`.
"""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.teachers.resnet import initialise

WIDTHS = (64, 128, 256, 512, 512)
# Convolutions in each of the five blocks.
COUNTS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2)}


class VGG(nn.Module):
    """[B, 3, 32, 32] -> [B, C]."""

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        channels = 3
        for index, (width, count) in enumerate(zip(WIDTHS, COUNTS[depth], strict=True)):
            self.add_module(f"block{index}", _block(channels, width, count))
            channels = width
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[2]
        for index in range(len(WIDTHS)):
            x = self.get_submodule(f"block{index}")(x)
            if index < 4:
                x = _halved(x, index, side)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


@torch.fx.wrap  # torch.fx follows no decision by a size, and need not look inside
def _halved(x: Tensor, index: int, side: int) -> Tensor:
    """The zoo halves three times, and a fourth time for 64x64 images only."""
    return F.max_pool2d(x, 2) if index < 3 or side == 64 else x


def _block(channels: int, width: int, count: int) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU, count times."""
    layers: list[nn.Module] = []
    for index in range(count):
        layers += [nn.Conv2d(width if index else channels, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)
