"""What guided images stand beside: five ways to come by labelled images without the teacher's data.

Each gives uint8 [count, 3, 32, 32] and labels int64 [count], classes in turn, and goes through the same distillation.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.prior_world import CLASS_NAMES, SIZE, prior_images
from dfkd.data.shards import Record, ShardFolder, read_folder
from dfkd.synthesis.statistics import averaged, bn_loss, tapped
from dfkd.teachers.classifier import Classifier

GROUP = 200  # images that DeepInversion optimises together, mixed classes, as its authors do


def labels_in_turn(count: int) -> Tensor:
    return torch.arange(count) % len(CLASS_NAMES)


def prior_data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """World Y itself, what the prior was trained on."""
    return prior_images(count, seed + 10_000, labels_in_turn(count))


def noise(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Uniform pixel noise, the same for all channels in half of the images."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.rand(count, 3, SIZE, SIZE, generator=generator)
    grey = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return (torch.where(grey, colour[:, :1], colour) * 255).round().to(torch.uint8), labels_in_turn(count)


def sharpened(images: Tensor, amount: float = 1.5, sigma: float = 1.0) -> Tensor:
    """Unsharp masking and a stretch to the full range, without a teacher: the control for a blurry prior.

    Args:
        images: uint8 [N, 3, H, W].
        amount: weight of what the blur took away.
        sigma: of the Gaussian blur, in pixels.
    """
    x = images.float() / 255
    taps = torch.arange(-3, 4).float()
    kernel = torch.exp(-(taps**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    padded = F.pad(x, (3, 3, 3, 3), mode="reflect")
    blurred = F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    x = x + amount * (x - blurred)
    low = x.flatten(1).quantile(0.01, 1)[:, None, None, None]
    high = x.flatten(1).quantile(0.99, 1)[:, None, None, None]
    return (((x - low) / (high - low).clamp_min(0.05)).clamp(0, 1) * 255).round().to(torch.uint8)


def deepinversion(teacher: Classifier, count: int, seed: int, seconds: float) -> tuple[Tensor, Tensor]:
    """DeepInversion (arXiv 1912.08795) in `seconds` of wall time: pixels optimised by Adam from noise.

    Loss: CE + 10 BN statistics of the batch (relative form) + 0.05 total variation, with random shifts
    of at most 2 pixels. The number of iterations per batch of 200 is what the time allows.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = labels_in_turn(count)
    layers = teacher.batch_norms()
    deadline, images = time.perf_counter() + seconds, []
    parts = labels.split(GROUP)
    for number, part in enumerate(parts):
        stop = time.perf_counter() + (deadline - time.perf_counter()) / (len(parts) - number)
        x = torch.rand(len(part), 3, SIZE, SIZE, generator=generator).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=0.2)
        while time.perf_counter() < stop:
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            with tapped(layers) as moments:
                logits = teacher.logits(torch.roll(x, shift, (2, 3)))
            batch = averaged(moments)
            variation = x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()
            loss = F.cross_entropy(logits, part) + 10 * bn_loss(batch, layers, "relative").sum() + 0.05 * variation
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            x.data.clamp_(0, 1)
        images.append((x.detach() * 255).round().to(torch.uint8))
    return torch.cat(images), labels


def write_shards(folder: Path, images: Tensor, labels: Tensor, seed: int, name: str) -> None:
    """A folder as dfkd-generate writes it, so that dfkd-distill takes it."""
    names = [CLASS_NAMES[label] for label in labels.tolist()]
    records = [
        Record(id=i, label=int(labels[i]), class_name=names[i], seed=seed, prompt="") for i in range(len(labels))
    ]
    size = images.shape[-1]
    with ShardFolder.create_or_open(
        folder, {"baseline": name, "seed": seed}, CLASS_NAMES, size, "png", len(labels), len(labels)
    ) as shards:
        shards.write(0, images.permute(0, 2, 3, 1).contiguous().numpy(), records)


def unguided_sharpened(unguided: Path) -> tuple[Tensor, Tensor]:
    """The unguided images of a folder, sharpened."""
    pool = read_folder(unguided)
    return sharpened(pool.images), pool.labels


__all__: Sequence[str] = ("deepinversion", "noise", "prior_data", "sharpened", "unguided_sharpened", "write_shards")
