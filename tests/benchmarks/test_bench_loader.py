"""The benchmark of loaders: every way shows every image, and a whole turn of it."""

import json
from pathlib import Path

import pytest

from benchmarks import bench_loader as bench
from benchmarks.loader_ways import OTHERS, OURS, epoch_of
from dfkd.errors import UsageError


@pytest.mark.parametrize("way", (*OURS, *OTHERS))
@pytest.mark.parametrize("name", ["32 png", "32 npy"])
def test_a_way_gives_every_image_once_an_epoch(tmp_path: Path, way: str, name: str) -> None:
    size, image_format, _ = bench.SETS[name]
    folder = bench.make_folder(tmp_path, size, image_format, 20)
    try:
        epoch = epoch_of(way, folder, 8, 0)
    except (ImportError, UsageError) as error:
        pytest.skip(str(error))
    for _ in range(2):
        found = list(epoch())
        assert sum(map(len, found)) == 20
        assert all(images.shape[1:] == (3, 32, 32) and str(images.dtype) == "torch.float32" for images in found)
        assert all(-2.01 < float(images.min()) < float(images.max()) < 2.01 for images in found)  # (x - 0.5) / 0.25


def test_a_turn_has_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BATCH", 8)
    result = bench.bench({"32 png": (32, "png", 16)}, 1, 1, 0, tmp_path)
    assert not [row for row in result["rates"] if "error" in row and row["way"] in OURS]
    assert result["steps"][0]["loader"] == bench.IN_MEMORY
    text = bench.markdown(json.loads(json.dumps(result)))
    assert "| 32 png | DataLoader + PIL |" in text and "1.00 |" in text and "the demo's step" in text
