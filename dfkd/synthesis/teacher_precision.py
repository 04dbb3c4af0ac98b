"""A teacher that guides in bfloat16: its convolutions and matrix products, forward and backward, by torch.autocast.

Weights stay where they are, norms and sums in float32 as autocast has them; logits come out in float32. On GPUs, and on
CPUs with bfloat16 units, that is up to twice as fast as float32.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from dfkd.teachers import Classifier
from dfkd.teachers.committee import Committee


class InBfloat16(nn.Module):
    """A network under autocast: images [B, 3, H, W] -> its logits [B, C], float32."""

    untraceable = "it runs under autocast"  # torch.fx would write it down without

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            logits: Tensor = self.network(images)
        return logits.float()


def narrowed(teacher: Classifier, dtype: str) -> Classifier:
    """The teacher, or each of several, with its network shared, in this --teacher-dtype; "fp32": as it is."""
    if dtype == "fp32":
        return teacher
    if isinstance(teacher, Committee):
        members = (replace(member, classifier=narrowed(member.classifier, dtype)) for member in teacher.members)
        several: Committee = teacher.replace(members=tuple(members))
        return several
    return teacher.replace(module=InBfloat16(teacher.module))
