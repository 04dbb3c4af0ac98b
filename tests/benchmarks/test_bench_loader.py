"""The benchmark of loaders: every way shows every image, and a whole turn of it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_loader as bench
from benchmarks.loader_ways import OTHERS, OURS, epoch_of
from dfkd.data.loader import dali
from dfkd.errors import UsageError

CPU = torch.device("cpu")


@pytest.mark.parametrize("way", (*OURS, *OTHERS))
@pytest.mark.parametrize("name", ["32 png", "32 npy"])
def test_a_way_gives_every_image_once_an_epoch(tmp_path: Path, way: str, name: str) -> None:
    size, image_format, _ = bench.SETS[name]
    folder = bench.make_folder(tmp_path, size, image_format, 20)
    try:
        epoch = epoch_of(way, folder, 8, 0, CPU)
    except (ImportError, UsageError) as error:
        pytest.skip(str(error))
    for _ in range(2):
        found = list(epoch())
        assert sum(map(len, found)) == 20
        assert all(images.shape[1:] == (3, 32, 32) and str(images.dtype) == "torch.float32" for images in found)
        assert all(-2.01 < float(images.min()) < float(images.max()) < 2.01 for images in found)  # (x - 0.5) / 0.25


def test_a_turn_has_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BATCH", 8)
    result = bench.bench({"32 png": (32, "png", 16)}, 1, 1, 0, tmp_path, CPU)
    assert not [row for row in result["rates"] if "error" in row and row["way"] in OURS]
    assert not [row for row in result["steps"] if "error" in row] or not dali.installed()
    assert bench.IN_MEMORY in [row["loader"] for row in result["steps"] if "slower" in row]
    text = bench.markdown(json.loads(json.dumps(result)))
    assert "| 32 png | DataLoader + PIL |" in text and "1.00 |" in text and "the demo's step" in text


def test_a_source_that_fails_costs_its_own_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bench.make_folder(tmp_path, 32, "png", 8)
    work = bench.Distillation(
        replace(bench.DEMO, settings=bench.DEMO.settings | {"batch_size": 4}), folder, 0, CPU, "off"
    )
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
    with pytest.raises(RuntimeError, match=r"one batch in memory: ZeroDivisionError"):
        bench.step_rows(work, "a step", 1, 1)


@pytest.mark.parametrize("training", bench.TRAININGS["cuda"], ids=lambda training: training.teacher)
def test_a_step_learns_from_every_source(tmp_path: Path, training: bench.Training) -> None:
    """What a GPU runs: the demo's networks and a pair of CIFAR's size, in bfloat16, on small batches here."""
    few = replace(training, settings=training.settings | {"batch_size": 2})
    work = bench.Distillation(few, bench.make_folder(tmp_path, 32, "png", 4), 0, CPU, "bf16")
    before = [weight.clone() for weight in work.student.parameters()]
    for way in bench.STEP_WAYS:
        if "dali" in way and not dali.installed():
            continue
        batch = next(work.batches(way))
        assert batch.images.dtype == torch.bfloat16
        work.step(batch)
    after = list(work.student.parameters())
    assert all(weight.isfinite().all() for weight in after)
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_the_table_has_a_part_for_each_training() -> None:
    """The recorded CPU's and a GPU's."""
    result = json.loads((bench.RESULTS / "loader-cpu.json").read_text())
    steps = [row | {"step": f"{bench.CIFAR.name} in bf16"} for row in result["steps"]]
    text = bench.markdown(result | {"steps": [*result["steps"], *steps]})
    assert text.count("| one batch in memory |") == 2
    assert "\n\n| a step of resnet34 to resnet18, 256 images, in bf16 on batches of | ms" in text
