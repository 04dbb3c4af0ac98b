"""Samples of a prior in training: a picture of some on the way, and what a classifier reads in those of the end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfkd.data.contact_sheet import preview
from dfkd.errors import UsageError
from dfkd.files import replace_file
from dfkd.runtime import generator
from dfkd.synthesis.prompts import words_of
from dfkd.teachers import Classifier
from dfkd.training.autoencoder import decode
from dfkd.training.denoising import CFG, FLOW, STEPS, Denoising, sample
from dfkd.training.prior_parts import Parts

CLASSES, EACH = 12, 4  # of a preview, at most
PIXELS = 64 * 64  # of what is denoised, in one call of the network
JUDGED, JUDGE_STEPS, JUDGE_CFGS = 200, 20, (1.0, 3.0)


def draw_images(
    parts: Parts, network: Denoising, labels: Tensor, seed: int, purpose: str, steps: int = STEPS, cfg: float = CFG
) -> Tensor:
    """uint8 [N, 3, H, W] on the CPU, of the classes int64 [N]; the same ones for the same arguments."""
    device = next(network.parameters()).device
    rows = max(2, PIXELS // parts.side**2)
    noise = torch.randn(len(labels), parts.channels, parts.side, parts.side, generator=generator(seed, purpose, 0))
    made, sampler = [], _sampler(parts.scheduler)
    for start in range(0, len(labels), rows):
        part = labels[start : start + rows].to(device)
        told, free = parts.conditions.of(part), parts.conditions.free(len(part))
        z0 = sample(network, sampler, noise[start : start + rows].to(device), told, free, steps, cfg)
        made.append(((decode(parts.vae, z0) + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(made)


def _sampler(scheduler: Any) -> Any:
    """A scheduler whose plain steps are a sampler: flow matching's own, else DDIM with the same noise levels."""
    from diffusers import DDIMScheduler

    return scheduler if type(scheduler).__name__ == FLOW else DDIMScheduler.from_config(scheduler.config)


def write_preview(file: Path, parts: Parts, network: Denoising, class_names: Sequence[str], seed: int) -> None:
    """A picture of samples, by class where the prior is told of one; from the same noise every time."""
    names = class_names if parts.conditions.kind != "none" else ("samples",)
    count = min(len(names), CLASSES)
    shown = torch.arange(count) * len(names) // count
    labels = shown.repeat_interleave(EACH if count > 1 else 2 * EACH)
    picture = preview(draw_images(parts, network, labels, seed, "preview"), labels, names)
    replace_file(file, lambda opened: picture.save(opened, "PNG"))


def check_judge(folder: Path, class_names: Sequence[str]) -> Classifier:
    """The classifier that is to read samples. Raises UsageError: it cannot be loaded, or has none of the classes."""
    judge = Classifier.from_pretrained(folder)
    if not _common(judge, class_names):
        why = f"it knows {', '.join(judge.class_names[:5])}, ..., the images are of {', '.join(class_names[:5])}, ..."
        raise UsageError(f"--judge {folder} has no class of the images", why, "give one that has, or leave it out")
    return judge


def judged(
    judge: Classifier, parts: Parts, network: Denoising, class_names: Sequence[str], seed: int
) -> dict[str, Any]:
    """Share of samples that the classifier puts in their class, by scale of classifier-free guidance."""
    device = next(network.parameters()).device
    judge = judge.freeze(device)
    both = _common(judge, class_names)
    labels = torch.tensor([class_names.index(name) for name in both])[torch.arange(JUDGED) % len(both)]
    wanted = torch.tensor([judge.class_names.index(both[i % len(both)]) for i in range(JUDGED)])
    right = {}
    for cfg in JUDGE_CFGS:
        images = draw_images(parts, network, labels, seed, "judge", JUDGE_STEPS, cfg)
        with torch.no_grad():
            answers = torch.cat([judge(part).argmax(1).cpu() for part in torch.split(images, 100)])
        right[f"{cfg:g}"] = float((answers == wanted).float().mean())
    return {"right": right, "samples": JUDGED, "steps": JUDGE_STEPS, "by": judge.source}


def _common(judge: Classifier, class_names: Sequence[str]) -> list[str]:
    known = {words_of(name) for name in judge.class_names}
    return [name for name in class_names if words_of(name) in known and name in judge.class_names]
