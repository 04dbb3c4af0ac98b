"""The benchmark of loaders: every way shows every image, and a whole turn of it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_loader as bench
from benchmarks.loader_ways import OTHERS, OURS, epoch_of
from benchmarks.machine import describe
from dfkd.data import dali_installed
from dfkd.errors import UsageError

CPU = torch.device("cpu")


def work_of(training: bench.Training, folder: Path, images: int, batch: int, amp: str = "off") -> bench.Distillation:
    few = replace(training, config=training.config.replace(batch_size=batch))
    return bench.Distillation(few, bench.make_folder(folder, 32, "png", images), 0, CPU, amp)


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


def test_a_turn_has_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BATCH", 8)
    result = bench.bench({"32 png": (32, "png", 16)}, 1, 1, 0, tmp_path, CPU)
    assert not [row for row in result["rates"] if "error" in row and row["way"] in OURS[1:]]
    assert not [row for row in result["steps"] if "error" in row] or not dali_installed()
    text = bench.markdown(json.loads(json.dumps({"machine": describe(CPU), **result})))
    assert "| 32 png | DataLoader + PIL |" in text and "| the demo's step on batches of |" in text


def test_an_epoch_that_lacks_images_is_an_error(tmp_path: Path) -> None:
    folder = bench.make_folder(tmp_path, 32, "png", 8)
    with pytest.raises(RuntimeError, match="8 of 9 images came"):
        bench.counting("resident", folder, 9, 0, CPU)


def test_a_source_that_fails_costs_its_own_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_of(bench.DEMO, tmp_path, 8, 4)
    good = work.batches

    def batches(way: str) -> Iterator[bench.Batch]:
        if way == "torch":
            return iter(())  # it ends in a turn
        if "dali" in way:
            raise RuntimeError("no such GPU")
        return good(way)

    monkeypatch.setattr(work, "batches", batches)
    rows = {row["loader"]: row for row in bench.step_rows(work, "a step", 1, 1)}
    assert rows["dali, decoding"]["error"] == "RuntimeError: no such GPU" and "StopIteration" in rows["torch"]["error"]
    assert "slower" in rows["resident"] and "slower" in rows[bench.IN_MEMORY]
    monkeypatch.setattr(work, "step", lambda batch: 1 / 0)
    with pytest.raises(RuntimeError, match="one batch in memory: ZeroDivisionError"):
        bench.step_rows(work, "a step", 1, 1)


@pytest.mark.parametrize("training", bench.TRAININGS["cuda"], ids=lambda training: training.teacher)
def test_a_step_takes_batches_of_every_source(tmp_path: Path, training: bench.Training) -> None:
    """What a GPU runs: the demo's networks and a pair of CIFAR's size, in bfloat16, on small batches here."""
    work = work_of(training, tmp_path, 4, 2, "bf16")
    for way in bench.STEP_WAYS:
        if "dali" not in way or dali_installed():
            batch = next(work.batches(way))
            assert batch.images.dtype == torch.bfloat16
            assert work.step(batch).isfinite()
