"""What one would write without this project: the baselines of its launches and of the parts around the networks.

The three functions of PLAIN take what those of kernels/guided_step.py take, and do the same by one operation a line.
"""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.loader_ways import viewed
from dfkd_kernels.guided_step import GuidedStep
from dfkd_kernels.rows import NetworkInput


def combined(model: Tensor, row: Tensor) -> Tensor:
    free, prompted = model.float().chunk(2)
    return free + row[7] * (prompted - free)


def taken(latents: Tensor, network: NetworkInput) -> Tensor:
    return (latents / network.scale + network.shift).to(network.dtype)


def unit(gradient: Tensor) -> Tensor:
    g = gradient.float()
    return g / g.square().mean((1, 2, 3), keepdim=True).sqrt()


def clean(
    z: Tensor, model: Tensor, row: Tensor, micro: int, copies: int, decoder: NetworkInput, keep: bool
) -> tuple[Tensor, None]:
    z0 = row[0] * z + row[1] * combined(model, row)
    return taken(z0, decoder), None


def push(
    before: Tensor,
    gradient: Tensor,
    length: Tensor,
    norm: str,
    unit_of_gradient: float,
    base: Tensor,
    decoder: NetworkInput,
    micro: int,
    copies: int,
) -> tuple[Tensor, Tensor]:
    after = before - length[:, None, None, None] * unit(gradient)
    return after, taken(base + after, decoder)


def update(
    z: Tensor,
    model: Tensor,
    row: Tensor,
    micro: int,
    copies: int,
    *,
    gradient: Tensor,
    length: Tensor,
    network: NetworkInput,
    next_copies: int,
    noise: Any = None,
) -> tuple[Tensor, Tensor]:
    """As a loop over a diffusers scheduler: the step, then the guidance, then noise of torch.randn."""
    after = row[2] * z + row[3] * combined(model, row)
    after = after - row[6] * length[:, None, None, None] * unit(gradient)
    if noise is not None:
        after = after + row[5] * torch.randn_like(after)
    return after, taken(torch.cat([after] * next_copies), network)


PLAIN = GuidedStep(clean, push, update)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float, labels: Tensor, ce_weight: float) -> Tensor:
    """As tutorials have it."""
    q, p = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    soft = temperature**2 * F.kl_div(q, p, reduction="batchmean")
    return soft + ce_weight * F.cross_entropy(student, labels)


def cutmix(latents: Tensor, labels: Tensor, random: np.random.Generator) -> Tensor:
    """Latent CutMix of [B, C, h, w], image by image."""
    mixed = latents.clone()
    height, width = latents.shape[2:]
    for i in range(len(latents)):
        same = (labels == labels[i]).nonzero()[:, 0]
        partner = int(same[random.integers(len(same))])
        side = np.sqrt(1 - random.beta(1.0, 1.0))
        h, w = int(side * height), int(side * width)
        y, x = int(random.integers(height)) - h // 2, int(random.integers(width)) - w // 2
        y0, y1, x0, x1 = max(y, 0), min(y + h, height), max(x, 0), min(x + w, width)
        mixed[i, :, y0:y1, x0:x1] = latents[partner, :, y0:y1, x0:x1]
    return mixed


def views(images: np.ndarray) -> Tensor:
    """Crops and flips of uint8 [B, S, S, 3], image by image."""
    return torch.stack([viewed(image) for image in images])


def write_shard(path: Path, images: np.ndarray) -> None:
    """A tar of PNG, label and record, as webdataset reads it."""
    with tarfile.open(path, "w") as tar:
        for i, image in enumerate(images):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            fields = {"png": file.getvalue(), "cls": b"0", "json": json.dumps({"id": i, "label": 0}).encode()}
            for name, data in fields.items():
                member = tarfile.TarInfo(f"{i:08d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def read_shard(path: Path) -> Tensor:
    """Its images, uint8 [B, S, S, 3]."""
    with tarfile.open(path) as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith(".png")]
        return torch.from_numpy(np.stack([np.array(Image.open(file).convert("RGB")) for file in files if file]))
