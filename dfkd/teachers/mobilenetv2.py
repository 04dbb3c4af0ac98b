"""MobileNetV2 (Sandler et al., arXiv:1801.04381), names of torchvision: `features.*`, `classifier.1`.

The zoo runs it on 32x32 images with its ImageNet strides: 1x1 before the pooling.
"""

from torch import Tensor, nn

from dfkd.teachers.resnet import initialise

# Expansion, channels out, blocks, stride of the first block (table 2).
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter every channel by 3x3, project by 1x1 without an activation."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        expand = [] if expansion == 1 else [_conv_bn_relu(channels, hidden, 1)]
        self.conv = nn.Sequential(
            *expand,
            _conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.residual = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """[B, 3, H, W] -> [B, C], H and W at least 32."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn_relu(3, 32, 3, 2)]
        channels = 32
        for expansion, width, count, stride in STAGES:
            for index in range(count):
                layers.append(InvertedResidual(channels, width, 1 if index else stride, expansion))
                channels = width
        layers.append(_conv_bn_relu(channels, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def _conv_bn_relu(channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU6())
