"""What others make of our folders: WebDataset, DALI, Hugging Face datasets, and readers of class folders."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from dfkd.config import IMAGE_FORMATS
from dfkd.data import ShardFolder, dali, export_imagefolder
from dfkd.errors import UsageError
from tests.shard_folders import CLASS_NAMES, contents, fill, make, open_for_writing, sample

needs_dali = pytest.mark.skipif(not dali.installed(), reason="NVIDIA DALI is not installed")


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("shard-*.tar"))


@pytest.mark.dali
@needs_dali
@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_an_index_is_what_dalis_own_tool_writes(tmp_path: Path, image_format: str) -> None:
    for shard in shards(make(tmp_path, image_format=image_format)):
        wanted = tmp_path / "theirs"
        subprocess.run([sys.executable, "-m", "wds2idx", str(shard), str(wanted)], check=True, capture_output=True)
        assert shard.with_suffix(".idx").read_text() == wanted.read_text()


@pytest.mark.dali
@needs_dali
def test_dalis_reader_takes_shard_and_index(tmp_path: Path) -> None:
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    files = shards(make(tmp_path))
    pipe = Pipeline(batch_size=10, num_threads=1, device_id=None)
    with pipe:
        encoded, label = fn.readers.webdataset(
            paths=[str(file) for file in files],
            index_paths=[str(file.with_suffix(".idx")) for file in files],
            ext=["png", "cls"],
        )
        pipe.set_outputs(fn.decoders.image(encoded), label)
    pipe.build()
    pixels, labels = pipe.run()
    images, records = sample(range(10), 8)
    assert np.array_equal(pixels.as_array(), images)
    assert [int(bytes(labels.at(i))) for i in range(10)] == [record.label for record in records]


def test_an_index_that_is_absent_or_altered_is_mended_without_the_shard(tmp_path: Path) -> None:
    before = contents(make(tmp_path))
    (tmp_path / "shard-00000.idx").unlink()
    (tmp_path / "shard-00001.idx").write_text("v1.2 4\n")
    with open_for_writing(tmp_path) as folder:
        assert folder.missing() == []
    assert contents(tmp_path) == before
    (tmp_path / "shard-00002.tar").write_bytes(b"")  # no tar file: its index waits for it
    with open_for_writing(tmp_path) as folder:
        fill(folder)
    assert contents(tmp_path) == before


def test_hugging_face_datasets_reads_the_shards(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = [str(file) for file in shards(make(tmp_path / "shards"))]
    rows = datasets.load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)
    found = list(rows)
    images, records = sample(range(10), 8)
    assert [row["__key__"] for row in found] == [f"{i:08d}" for i in range(10)]
    assert [int(row["cls"]) for row in found] == [record.label for record in records]
    assert [row["json"]["prompt"] for row in found] == [record.prompt for record in records]
    assert all(np.array_equal(np.asarray(row["png"]), image) for row, image in zip(found, images, strict=True))


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    make(tmp_path)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    images, records = sample(range(10), 8)
    assert [item["__key__"] for item in samples] == [f"{i:08d}" for i in range(10)]
    assert [item["cls"] for item in samples] == [record.label for record in records]
    assert [item["json"]["prompt"] for item in samples] == [record.prompt for record in records]
    assert all(np.array_equal(item["png"], image) for item, image in zip(samples, images, strict=True))


def test_an_imagefolder_has_torchvisions_layout(tmp_path: Path) -> None:
    """root/<class>/<image>: classes are the folders in the order of their names, which classes.json maps to labels."""
    export_imagefolder(make(tmp_path / "shards"), tmp_path / "out")
    out = tmp_path / "out"
    folders = sorted(folder.name for folder in out.iterdir() if folder.is_dir())
    assert folders == sorted(CLASS_NAMES)
    labels = json.loads((out / "classes.json").read_text())
    files = [file for name in folders for file in sorted((out / name).iterdir())]
    assert len(files) == 10 and {file.suffix for file in files} == {".png"}  # which torchvision knows
    for file in files:
        assert labels[file.parent.name] == int(file.stem) % 3
        assert np.array_equal(np.asarray(Image.open(file)), sample(range(int(file.stem), int(file.stem) + 1), 8)[0][0])


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


def test_jpeg_bytes_are_copied(tmp_path: Path) -> None:
    export_imagefolder(make(tmp_path, image_format="jpg"))
    data = (tmp_path / "imagefolder" / "two" / "00000005.jpg").read_bytes()
    assert data in (tmp_path / "shard-00001.tar").read_bytes()


def test_a_class_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    with ShardFolder.create_or_open(tmp_path, {}, ("and/or",), 8, "png", 1, 1) as folder:
        images, records = sample(range(1), 8)
        folder.write(0, images, records)
    with pytest.raises(UsageError, match="and/or"):
        export_imagefolder(tmp_path)
