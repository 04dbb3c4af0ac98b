"""What one would write without this project: the baselines of its kernels and of the parts around the networks."""

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


def guided_step(z: Tensor, model: Tensor, row: Tensor, *, push: Tensor, noise: Any = None) -> tuple[Tensor, Tensor]:
    """The step of a loop over a diffusers scheduler: classifier-free guidance, the step, then noise of torch.randn."""
    free, prompted = model.float()
    predicted = free + row[7] * (prompted - free)
    clean = row[0] * z + row[1] * predicted + push
    after = row[2] * z + row[3] * predicted + row[6] * push
    return (after if noise is None else after + row[5] * torch.randn_like(after)), clean


def soft_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """As tutorials have it."""
    q, p = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(q, p, reduction="batchmean")


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
