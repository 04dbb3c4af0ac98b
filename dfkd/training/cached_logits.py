"""The teacher's logits of every image once, where each step would ask for the same ones: without views and mixtures."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd.training.settings import DistillSettings
from dfkd.errors import UsageError
from dfkd.data.loader import Form, Images, Views, read_all
from dfkd.teachers.classifier import Classifier

LARGEST = 2**30  # bytes of a table that is made unasked


@dataclass(frozen=True)
class CacheChoice:
    """Whether the logits are cached. why: for people."""

    on: bool
    why: str


def check_cache(settings: DistillSettings) -> None:
    """Raise UsageError: "on" where the images of a step are not those of the pool."""
    if settings.cache_logits == "on" and (why := _changing(settings)):
        raise UsageError(
            "--cache-logits on", why, "leave it out, or use --augment none --mix none and no --msarc-weight"
        )


def choose_cache(settings: DistillSettings, images: int, classes: int) -> CacheChoice:
    """What settings.cache_logits comes to for so many training images."""
    if settings.cache_logits == "off":
        return CacheChoice(False, "as asked")
    if why := _changing(settings):
        return CacheChoice(False, why)
    size = images * classes * 4
    text = f"{images} images of {classes} classes are {size / 1e6:.1f} MB"
    if settings.cache_logits == "auto" and size > LARGEST:
        return CacheChoice(False, f"{text}, more than {LARGEST / 1e6:.0f}")
    return CacheChoice(True, text)


def _changing(settings: DistillSettings) -> str:
    """Why the teacher is asked at every step; empty where it need not be."""
    if settings.msarc_weight:
        return "mSARC compares the teacher's feature maps in every step"
    given = {"augment": settings.augment, "mix": settings.mix}
    changing = [f"--{name} {value}" for name, value in given.items() if value != "none"]
    return f"with {' and '.join(changing)} the teacher sees other images at every step" if changing else ""


@torch.no_grad()
def logits_table(
    teacher: Classifier, data: Images, positions: Tensor, form: Form, rows: int, amp: torch.dtype
) -> Tensor:
    """The teacher's logits [n, C] of the images at positions int64 [n], on the device, in the dtype of a step's.

    They are taken as a step takes them, ``rows`` at a time and under autocast (float32: none), the last call filled up:
    libraries round rows of a smaller call differently. Some round a row by its place in the call too, so they are a
    step's but for rounding.
    """
    parts = []
    for part in torch.split(positions, rows):
        pixels = read_all(data, part, form.size).permute(0, 2, 3, 1).contiguous().to(form.device)
        images = form.finish(F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, rows - len(part))), Views())
        with torch.autocast(form.device.type, amp, enabled=amp != torch.float32):
            parts.append(teacher.module(images)[: len(part)])
    return torch.cat(parts)
