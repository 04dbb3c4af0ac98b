"""The parts around the networks: Latent CutMix, random views, shards written and read; baselines are of plain.py."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.suite import plain
from benchmarks.suite.case import Group, Place, Work
from dfkd.data import KINDS, Record, ShardFolder, apply_views, draw, read_folder
from dfkd.synthesis import cutmix
from dfkd_kernels.guided_step import paste

IMAGES, SIZE = 256, 32
LATENT = (8, 8, 8)
CLASSES = 10


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8)


def plain_cutmix(place: Place) -> Work:
    latents, labels = torch.randn(IMAGES, *LATENT), torch.arange(IMAGES) % CLASSES
    return Work(partial(plain.cutmix, latents, labels, np.random.default_rng(0)), IMAGES)


def our_cutmix(place: Place) -> Work:
    ids, latents = torch.arange(IMAGES), torch.randn(IMAGES, *LATENT)

    def mix() -> torch.Tensor:
        plan = cutmix.plan(0, ids, ids % CLASSES, 0, 1.0, *LATENT[1:])
        return paste(latents, plan.partner, plan.box)

    return Work(mix, IMAGES)


def plain_views(place: Place) -> Work:
    return Work(partial(plain.views, pixels()), IMAGES)


def our_views(kind: str, place: Place) -> Work:
    images, generator = torch.rand(IMAGES, 3, SIZE, SIZE), torch.Generator().manual_seed(0)
    return Work(lambda: apply_views(images, draw(kind, IMAGES, SIZE, SIZE, generator)), IMAGES)


def plain_written(place: Place) -> Work:
    return Work(partial(plain.write_shard, place.folder / "plain.tar", pixels()), IMAGES)


def our_folder(place: Place) -> ShardFolder:
    path = Path(tempfile.mkdtemp(dir=place.folder))
    return ShardFolder.create_or_open(path, {}, ("zero",), SIZE, "png", IMAGES, IMAGES)


def our_shard() -> tuple[np.ndarray, list[Record]]:
    losses = {"bn": 1.0, "cls": 1.0}
    return pixels(), [Record(i, 0, "zero", 0, "a photo", losses=losses) for i in range(IMAGES)]


def written(place: Place) -> Work:
    return Work(partial(our_folder(place).write, 0, *our_shard()), IMAGES)


def plain_read(place: Place) -> Work:
    path = place.folder / "read.tar"
    plain.write_shard(path, pixels())
    return Work(partial(plain.read_shard, path), IMAGES)


def read(place: Place) -> Work:
    with our_folder(place) as folder:
        folder.write(0, *our_shard())
    return Work(partial(read_folder, folder.path), IMAGES)


def groups(device: torch.device, quick: bool) -> list[Group]:
    views = {kind: partial(our_views, kind) for kind in KINDS if kind != "none"}
    alone, tar = "one image at a time", "tarfile and PIL"
    return [
        Group("latent CutMix", alone, {alone: plain_cutmix, "ours": our_cutmix}, "images"),
        Group("random views", f"crop-flip, {alone}", {f"crop-flip, {alone}": plain_views, **views}, "images"),
        Group("a shard written", tar, {tar: plain_written, "ours": written}, "images"),
        Group("a shard read", tar, {tar: plain_read, "ours": read}, "images"),
    ]


def test_part(paired: Callable[[], None]) -> None:
    paired()
