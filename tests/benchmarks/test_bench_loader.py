"""The benchmark of loaders: every way shows every image, and a step takes batches of every source."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_loader as bench
from benchmarks.loader_ways import OTHERS, OURS, epoch_of
from dfkd.data import dali_installed
from dfkd.errors import UsageError

CPU = torch.device("cpu")


@pytest.mark.parametrize("way", (*OURS, *OTHERS))
@pytest.mark.parametrize("image_format", ["png", "npy"])
def test_a_way_gives_every_image_once_an_epoch(tmp_path: Path, way: str, image_format: str) -> None:
    folder = bench.make_folder(tmp_path, 32, image_format, 20)
    try:
        epoch = epoch_of(way, folder, 8, 0, CPU)
    except (ImportError, UsageError) as error:
        pytest.skip(str(error))
    for _ in range(2):
        found = list(epoch())
        assert sum(map(len, found)) == 20
        assert all(images.shape[1:] == (3, 32, 32) and images.dtype == torch.float32 for images in found)
        assert all(-2.01 < float(images.min()) < float(images.max()) < 2.01 for images in found)  # (x - 0.5) / 0.25


def test_an_epoch_that_lacks_images_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.epoch("resident", tmp_path, (32, "png", 8), 0, CPU).amount == 8
    monkeypatch.setattr(bench, "epoch_of", lambda *_: lambda: [torch.zeros(7, 3, 32, 32)])
    with pytest.raises(RuntimeError, match="7 of 8 images came"):
        bench.epoch("resident", tmp_path, (32, "png", 8), 0, CPU)


@pytest.mark.parametrize("training", bench.TRAININGS["cuda"], ids=lambda training: training.teacher)
def test_a_step_takes_batches_of_every_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: bench.Training
) -> None:
    """What a GPU runs: the demo's networks and a pair of CIFAR's size, in bfloat16, on small batches here."""
    few = replace(training, images=4, config=training.config.replace(batch_size=2))
    monkeypatch.setattr(bench, "TRAININGS", {"cpu": (few,)})
    (group,) = bench.groups(CPU, tmp_path, 0, {}, "bf16")
    assert group.baseline == bench.IN_MEMORY and len(group.rows) == 6
    for way, make in group.rows.items():
        if "dali" not in way or dali_installed():
            work = make()
            assert work.amount == 2 and work.call().isfinite()
