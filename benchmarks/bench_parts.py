"""Times of the parts around the networks (make bench); what the networks cost is in guidance_paths."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from dfkd.loader import KINDS, draw
from dfkd.loader.views import apply
from dfkd.shards import Record, ShardFolder, read_folder
from dfkd.synthesis import cutmix
from kernels.philox import philox_normal

IMAGES = 256
LATENT = (8, 8, 8)
SIZE = 32


def test_noise_of_a_batch(benchmark: BenchmarkFixture) -> None:
    noise = benchmark(philox_normal, 0, torch.arange(IMAGES), 0, LATENT, torch.float32)
    assert noise.shape == (IMAGES, *LATENT)


def test_latent_cutmix_of_a_group(benchmark: BenchmarkFixture) -> None:
    ids = torch.arange(IMAGES)
    latents = torch.randn(IMAGES, *LATENT)

    def mix() -> torch.Tensor:
        return cutmix.apply(latents, cutmix.plan(0, ids, ids % 10, 0, 1.0, *LATENT[1:]))

    assert benchmark(mix).shape == latents.shape


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_augmented_batch(benchmark: BenchmarkFixture, kind: str) -> None:
    images = torch.rand(IMAGES, 3, SIZE, SIZE)

    def augmented() -> torch.Tensor:
        return apply(images, draw(kind, IMAGES, SIZE, SIZE, torch.Generator()))

    assert benchmark(augmented).shape == images.shape


def test_shard_written(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    with _folder(tmp_path) as folder:
        benchmark(folder.write, 0, *_shard())


def test_shard_read(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    with _folder(tmp_path) as folder:
        folder.write(0, *_shard())
    assert len(benchmark(read_folder, tmp_path).labels) == IMAGES


def _folder(path: Path) -> ShardFolder:
    return ShardFolder.create_or_open(path, {}, ("zero",), SIZE, "png", IMAGES, IMAGES)


def _shard() -> tuple[np.ndarray, list[Record]]:
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8)
    losses: dict[str, float] = {"bn": 1.0, "cls": 1.0}
    return images, [Record(i, 0, "zero", 0, "a photo", None, None, losses, {}, 0.5) for i in range(IMAGES)]
