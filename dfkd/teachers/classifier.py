"""A trained network together with what it takes to feed it and to read it."""

import hashlib
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Classifier:
    """A teacher or a student.

    module        normalised images [B, 3, input_size, input_size] -> logits [B, len(class_names)]
    architecture  the name that build() takes
    mean, std     per channel, of images in 0..1
    """

    module: nn.Module
    architecture: str
    class_names: tuple[str, ...]
    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def prepare(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1, any float dtype -> resized and normalised, differentiable.

        Resizing is bicubic without antialiasing, as in the published guidance, and only where the size differs.
        """
        if images.shape[-2:] != (self.input_size, self.input_size):
            size = [self.input_size, self.input_size]
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
        mean = images.new_tensor(self.mean).view(1, 3, 1, 1)
        std = images.new_tensor(self.std).view(1, 3, 1, 1)
        return (images - mean) / std

    def logits(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 -> logits [B, C]."""
        logits: Tensor = self.module(self.prepare(images))
        return logits

    def digest(self) -> str:
        """SHA-256 over architecture, every weight and buffer, and how images are prepared."""
        digest = hashlib.sha256(f"{self.architecture} {self.input_size} {self.mean} {self.std}".encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def batch_norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """The layers whose running statistics describe the training data, in definition order; () for e.g. a ViT.

        Synchronised and frozen ones are among them, whose tensors are those of a BatchNorm2d.
        """
        return tuple(
            cast(nn.BatchNorm2d, layer)
            for layer in self.module.modules()
            if (isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm) or is_frozen(layer))
            and layer.running_mean is not None
        )


def is_frozen(layer: nn.Module) -> bool:
    """Whether it is the layer that torchvision and detectron2 have by this name, whose four tensors are buffers."""
    return type(layer).__name__ == "FrozenBatchNorm2d"
