"""World Y, all that the embedded prior has ever seen: UCI digits in random colours on random smooth backgrounds.

    python -m benchmarks.prior_world runs/world-y     writes digits/ and autoencoder/, folders for dfkd-train-prior

The digits are scikit-learn's 1 797 images of 8x8 pixels (UCI Optical Recognition of Handwritten Digits, test part).
No photograph and no MNIST image enters here; `textures` are procedural and teach the autoencoder alone.
Every function draws from the generator that it is given, so one seed gives one world.
"""

import argparse
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 32


@cache
def uci_digits() -> tuple[Tensor, Tensor]:
    """The source digits: intensities [1797, 1, 8, 8] in 0..1 and labels [1797]."""
    from sklearn.datasets import load_digits  # here, since benchmarks that need no digit import this module too

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return images, torch.tensor(digits.target, dtype=torch.int64)


def _uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)


def _smooth_field(n: int, channels: int, cells: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise of `cells` x `cells` values, enlarged to [n, channels, 32, 32] by a random crop of a bicubic."""
    coarse = torch.randn(n, channels, cells + 1, cells + 1, generator=generator)
    return F.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=False)


def stroke_masks(index: Tensor, generator: torch.Generator) -> Tensor:
    """Strokes of the digits `index` [n] as soft masks [n, 1, 32, 32] in 0..1: random pose and thickness, sharp edge."""
    n = len(index)
    angle = _uniform(n, -0.3, 0.3, generator)
    shear = _uniform(n, -0.25, 0.25, generator)
    sx, sy = _uniform(n, 0.85, 1.35, generator), _uniform(n, 0.85, 1.25, generator)
    tx, ty = _uniform(n, -0.22, 0.22, generator), _uniform(n, -0.18, 0.18, generator)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [torch.stack([sx * cos, sx * (shear - sin), tx], 1), torch.stack([sy * sin, sy * cos, ty], 1)], 1
    )
    source = F.interpolate(uci_digits()[0][index], (64, 64), mode="bicubic", align_corners=False)
    posed = F.grid_sample(source, F.affine_grid(theta, [n, 1, SIZE, SIZE], False), "bilinear", "zeros", False)
    threshold = _uniform(n, 0.30, 0.62, generator)[:, None, None, None]
    softness = _uniform(n, 0.06, 0.16, generator)[:, None, None, None]
    return torch.sigmoid((posed - threshold) / softness)


def smooth_backgrounds(n: int, generator: torch.Generator) -> Tensor:
    """Backgrounds [n, 3, 32, 32] in 0..1: a colour plus a low-frequency field of random strength."""
    colour = torch.rand(n, 3, 1, 1, generator=generator)
    parts = [_smooth_field(n, 1, c, generator) + 0.6 * _smooth_field(n, 3, c, generator) for c in (1, 3, 6)]
    which = torch.randint(3, (n,), generator=generator)
    field = torch.stack(parts)[which, torch.arange(n)]
    strength = _uniform(n, 0.0, 0.22, generator)[:, None, None, None]
    return (colour + strength * field).clamp(0, 1)


def paint(masks: Tensor, backgrounds: Tensor, generator: torch.Generator) -> Tensor:
    """Strokes in a random colour that stands out from the background: [n, 3, 32, 32] in 0..1."""
    n = len(masks)
    mean = backgrounds.mean((2, 3))
    candidates = torch.rand(8, n, 3, generator=generator)
    distance = (candidates - mean).norm(dim=2)
    far = distance > 0.6
    choice = torch.where(far.any(0), far.float().argmax(0), distance.argmax(0))
    colour = candidates[choice, torch.arange(n)][:, :, None, None]
    shading = _uniform(n, 0.0, 0.12, generator)[:, None, None, None] * _smooth_field(n, 3, 2, generator)
    return (backgrounds + masks * ((colour + shading).clamp(0, 1) - backgrounds)).clamp(0, 1)


def prior_images(count: int, seed: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A sample of world Y.

    Args:
        count: number of images.
        seed: seed of the world's draw.
        labels: int64 [count], the digits wanted; random when None.

    Returns:
        Images uint8 [count, 3, 32, 32] and labels int64 [count].
    """
    generator = torch.Generator().manual_seed(seed)
    _, targets = uci_digits()
    if labels is None:
        index = torch.randint(len(targets), (count,), generator=generator)
    else:
        by_class = [torch.nonzero(targets == c)[:, 0] for c in range(len(CLASS_NAMES))]
        draw = torch.rand(count, generator=generator)
        index = torch.stack(
            [by_class[int(c)][int(u * len(by_class[int(c)]))] for c, u in zip(labels, draw, strict=True)]
        )
    images = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8)
    for start in range(0, count, 1000):
        part = index[start : start + 1000]
        painted = paint(stroke_masks(part, generator), smooth_backgrounds(len(part), generator), generator)
        images[start : start + 1000] = (painted * 255).round().to(torch.uint8)
    return images, targets[index]


def textures(n: int, generator: torch.Generator) -> Tensor:
    """Procedural textures [n, 3, 32, 32] in 0..1: octaves of noise, dead leaves and gratings, mixed at random."""
    octaves = sum(
        _uniform(n, 0, 1, generator)[:, None, None, None]
        * (_smooth_field(n, 1, c, generator) + 0.5 * _smooth_field(n, 3, c, generator))
        for c in (2, 4, 8, 16, 31)
    )
    assert isinstance(octaves, Tensor)
    octaves = octaves / octaves.flatten(1).std(1)[:, None, None, None]
    noise = (
        torch.rand(n, 3, 1, 1, generator=generator) + _uniform(n, 0.05, 0.3, generator)[:, None, None, None] * octaves
    )

    ys, xs = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    leaves = torch.rand(n, 3, 1, 1, generator=generator).expand(n, 3, SIZE, SIZE).clone()
    for _ in range(24):
        cx, cy = (_uniform(n, 0, SIZE, generator)[:, None, None] for _ in range(2))
        radius = (2 + 10 * torch.rand(n, generator=generator) ** 2)[:, None, None]
        stretch = _uniform(n, 0.4, 2.5, generator)[:, None, None]
        inside = ((xs - cx) ** 2 * stretch + (ys - cy) ** 2 / stretch < radius**2)[:, None]
        leaves = torch.where(inside, torch.rand(n, 3, 1, 1, generator=generator), leaves)

    angle, freq, phase = (
        _uniform(n, lo, hi, generator)[:, None, None] for lo, hi in ((0, math.pi), (0.2, 1.6), (0, 6.3))
    )
    wave = torch.sin(freq * (xs * angle.cos() + ys * angle.sin()) + phase)[:, None]
    contrast = _uniform(n, 0.05, 0.3, generator)[:, None, None, None] * (
        torch.rand(n, 3, 1, 1, generator=generator) + 0.3
    )
    gratings = torch.rand(n, 3, 1, 1, generator=generator) + contrast * wave
    which = torch.multinomial(torch.tensor([0.5, 0.35, 0.15]), n, True, generator=generator)
    return torch.stack([noise, leaves, gratings])[which, torch.arange(n)].clamp(0, 1)


def write_folders(root: Path, count: int, seed: int = 0) -> None:
    """root/digits/<class>/ of `count` images, what the prior learns, and root/autoencoder/ of two thirds as many."""
    images, labels = prior_images(count, seed)
    write_images(root / "digits", images, [CLASS_NAMES[label] for label in labels.tolist()])
    (root / "digits" / "classes.json").write_text(json.dumps(CLASS_NAMES))  # their order is not that of their names
    images = autoencoder_images(count * 2 // 3, seed)
    kinds = ["digits" if i < len(images) // 2 else "textures" for i in range(len(images))]
    write_images(root / "autoencoder", images, kinds)


def write_images(folder: Path, images: Tensor, names: Sequence[str]) -> None:
    """folder/<name>/<number>.png of uint8 [N, 3, H, W]."""
    for name in sorted(set(names)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, (image, name) in enumerate(zip(images.permute(0, 2, 3, 1).numpy(), names, strict=True)):
        Image.fromarray(image).save(folder / name / f"{i:05d}.png")


def autoencoder_images(count: int, seed: int) -> Tensor:
    """What the autoencoder trains on, uint8 [count, 3, 32, 32]: half world Y, a quarter textures, a quarter both."""
    generator = torch.Generator().manual_seed(seed)
    plain, _ = prior_images(count // 2, seed)
    rest = []
    for start in range(0, count - count // 2, 1000):
        n = min(1000, count - count // 2 - start)
        images = textures(n, generator)
        index = torch.randint(len(uci_digits()[1]), (n,), generator=generator)
        drawn = paint(stroke_masks(index, generator), images, generator)
        keep = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
        rest.append((torch.where(keep, drawn, images) * 255).round().to(torch.uint8))
    return torch.cat([plain, *rest])


if __name__ == "__main__":
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("out", type=Path, help="folder to write")
    given.add_argument("--count", type=int, default=60000, help="digits (default 60000)")
    asked = given.parse_args()
    write_folders(asked.out, asked.count)
