import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfkd.errors import UsageError
from dfkd.data.imagefolder import export_imagefolder
from dfkd.data.shards import ShardFolder
from tests.shard_folders import CLASS_NAMES, contents, make, sample


@pytest.mark.parametrize("image_format", ["png", "npy"])
def test_pixels_and_records_survive(tmp_path: Path, image_format: str) -> None:
    out = tmp_path / "out"
    assert export_imagefolder(make(tmp_path / "shards", image_format=image_format), out) == 10
    images, records = sample(range(10), 8)
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    for image, record, line in zip(images, records, lines, strict=True):
        assert line["file_name"] == f"{record.class_name}/{record.id:08d}.png"
        assert (line["id"], line["label"], line["prompt"]) == (record.id, record.label, record.prompt)
        assert np.array_equal(np.array(Image.open(out / line["file_name"])), image)
    assert json.loads((out / "classes.json").read_text()) == {name: i for i, name in enumerate(CLASS_NAMES)}


def test_jpeg_bytes_are_copied_and_the_default_place_is_the_folder_itself(tmp_path: Path) -> None:
    export_imagefolder(make(tmp_path, image_format="jpg"))
    data = (tmp_path / "two" / "00000005.jpg").read_bytes()
    assert data in (tmp_path / "shard-00001.tar").read_bytes()


def test_exporting_again_changes_nothing(tmp_path: Path) -> None:
    make(tmp_path)
    export_imagefolder(tmp_path)
    before = contents(tmp_path / "one")
    export_imagefolder(tmp_path)
    assert contents(tmp_path / "one") == before


def test_a_class_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    with ShardFolder.create_or_open(tmp_path, {}, ("and/or",), 8, "png", 1, 1) as folder:
        images, records = sample(range(1), 8)
        folder.write(0, images, records)
    with pytest.raises(UsageError, match="and/or"):
        export_imagefolder(tmp_path)
