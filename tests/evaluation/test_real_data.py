"""Real data: the splits share nothing, are balanced, and are the same at every call."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd.data import Form, ImageFiles, LoaderChoice, Pool, Step, Views, dali_installed, list_folder, open_source
from dfkd.errors import UsageError
from dfkd.evaluation import check_data, class_names_of, open_images
from dfkd.evaluation import digits_on_photos as world
from dfkd.evaluation.split import SPLITS, stratified

COUNTS = {"train": 3500, "validation": 500, "test": 1000}


def load(name: str, split: str, size: int = 8) -> Pool:
    """A split in memory; its pixels as they are drawn for images of this size."""
    images = open_images(name, split, size)
    rows = torch.arange(len(images.labels))
    return Pool(images.read(rows), images.labels, rows, images.class_names)


def test_no_photo_pixel_is_shared_between_splits():
    photos = world._photos()
    owners = [np.zeros((3, *photo.shape[:2]), bool) for photo in photos]
    for index, split in enumerate(SPLITS):
        for photo, top, left in world.patch_corners(split, COUNTS[split], photos):
            owners[photo][index, top : top + world.SIDE, left : left + world.SIDE] = True
    for owner in owners:
        assert owner.sum(axis=0).max() == 1, "a pixel is used by two splits"
        assert (owner.any(axis=0)).mean() > 0.9, "most of each photo is used"


def test_tiles_partition_each_photo():
    photos = world._photos()
    for index, photo in enumerate(photos):
        times = np.zeros(photo.shape[:2], int)
        for split in SPLITS:
            for owner, top, bottom, left, right in world.tiles(split, photos):
                assert min(bottom - top, right - left) >= world.MIN_TILE > world.SIDE
                if owner == index:
                    times[top:bottom, left:right] += 1
        assert (times == 1).all()


def test_no_digit_is_shared_between_splits():
    _, labels = world._mnist()
    cut = stratified(labels, (0.7, 0.1, 0.2))
    assert np.array_equal(np.sort(np.concatenate([cut[split] for split in SPLITS])), np.arange(5000))


@pytest.mark.parametrize("split", SPLITS)
def test_digits_on_photos(split):
    data = load("digits-on-photos", split, 32)
    count = COUNTS[split]
    assert (data.images.shape, data.images.dtype) == ((count, 3, 32, 32), torch.uint8)
    assert data.labels.dtype == torch.int64
    assert data.labels.bincount().tolist() == [count // 10] * 10
    assert data.class_names[3] == "three"
    again = load("digits-on-photos", split, 32)
    assert torch.equal(again.images, data.images) and torch.equal(again.labels, data.labels)


def test_border_shows_the_photo_untouched():
    """The 28x28 digit leaves a frame of two pixels, which must be the patch itself."""
    photos = world._photos()
    images = load("digits-on-photos", "test", 32).images
    for image, (photo, top, left) in zip(images[:20], world.patch_corners("test", 1000, photos)[:20], strict=True):
        patch = torch.tensor(photos[photo][top : top + 32, left : left + 32]).permute(2, 0, 1)
        assert torch.equal(image[:, :2], patch[:, :2]) and torch.equal(image[:, :, -2:], patch[:, :, -2:])


@pytest.fixture
def folder(tmp_path):
    """Three classes of 20 flat images, the class in the red channel and the image's number in the green one."""
    for label, name in enumerate(("2", "10", "bird")):
        (tmp_path / name).mkdir()
        for index in range(20):
            Image.new("RGB", (8, 8), (label, index, 0)).save(tmp_path / name / f"{index:02d}.png")
    return tmp_path


def test_imagefolder_orders_classes_by_number_and_cuts_by_class(folder):
    seen = {split: load(f"imagefolder:{folder}", split) for split in SPLITS}
    assert seen["train"].class_names == ("2", "10", "bird")
    assert [len(seen[split].labels) for split in SPLITS] == [42, 6, 12]
    pixels = torch.cat([seen[split].images[:, :2, 0, 0] for split in SPLITS])
    assert len(pixels.unique(dim=0)) == 60, "an image is in two splits"
    assert torch.equal(pixels[:, 0].long(), torch.cat([seen[split].labels for split in SPLITS]))


def test_list_with_a_file_per_split_holds_validation_out_of_train(folder):
    for split, indices in (("train", range(10)), ("test", range(10, 20))):
        lines = [f"{name}/{i:02d}.png {label}" for label, name in enumerate(("2", "10", "bird")) for i in indices]
        (folder / f"toy_{split}.txt").write_text("\n".join(lines))
    seen = {split: load(f"list:{folder}/toy_{{split}}.txt", split) for split in SPLITS}
    assert [len(seen[split].labels) for split in SPLITS] == [27, 3, 30]
    assert seen["test"].class_names == ("2", "10", "bird")
    assert seen["test"].images[:, 1].min() == 10
    assert seen["train"].images[:, 1].max() < 10 and seen["validation"].images[:, 1].max() < 10


def test_parquet_in_the_hugging_face_layout(folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": (folder / "2" / f"{i:02d}.png").read_bytes(), "path": None} for i in range(10)]
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pyarrow.table({"image": rows, "label": [0, 1] * 5})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, folder / "test.parquet")
    data = load(f"parquet:{folder}/{{split}}.parquet", "test")
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 1] * 5
    assert data.images[:, 1, 0, 0].tolist() == list(range(10))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match="pip install pyarrow"):
        load(f"parquet:{tmp_path}", "test")


def test_a_folder_may_be_named_alone_and_taken_whole(folder):
    whole = load(str(folder), "all")
    assert len(whole.labels) == 60 and whole.class_names == ("2", "10", "bird")
    assert len(load(str(folder), "test").labels) == 12


@pytest.mark.parametrize(
    "name, split, message",
    [
        ("mnist", "test", "unknown data 'mnist'"),
        ("imagefolder:/nowhere", "test", "there is no /nowhere"),
        ("list:/nowhere", "test", "there is no /nowhere"),
        ("digits-on-photos", "val", "unknown split 'val'"),
        ("digits-on-photos", "all", "no split 'all'"),
        ("list:{split}.txt", "all", "there is no train.txt"),
    ],
)
def test_errors_before_work(name, split, message):
    with pytest.raises(UsageError, match=message):
        load(name, split)


def test_what_can_be_known_without_reading(folder, tmp_path):
    (tmp_path / "x_train.txt").touch()
    (tmp_path / "y.parquet").touch()
    listed = f"list:{tmp_path}/x_{{split}}.txt"
    for name in ("digits-on-photos", f"imagefolder:{folder}", str(folder), listed):
        check_data("--test", name)
        check_data("--test", name, "validation")
    for name, split, words in (
        ("mnist", "test", "no such data"),
        ("list:absent.txt", "test", "there is no absent.txt"),
        (listed, "test", "there is no .*x_test.txt"),
        (listed, "all", "no split 'all'"),
        ("digits-on-photos", "all", "no split 'all'"),
    ):
        with pytest.raises(UsageError, match=f"--test {re.escape(name)}: .*{words}"):
            check_data("--test", name, split)


def test_class_names_are_known_without_decoding(folder, tmp_path):
    assert class_names_of(f"imagefolder:{folder}") == open_images(f"imagefolder:{folder}", "test", 8).class_names
    assert class_names_of("digits-on-photos")[9] == "nine"


@pytest.mark.dali
@pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed")
def test_dali_fits_files_of_any_size_as_pillow_does(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    sizes = [(40, 40), (64, 40), (40, 57), (91, 133), (20, 31), (24, 24)]
    for index, (width, height) in enumerate(sizes):
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(
            tmp_path / "a" / f"{index}.{('png', 'jpg')[index % 2]}"
        )
    files = ImageFiles(list_folder(tmp_path), 24)
    form = Form(24, (0.0,) * 3, (1.0,) * 3, torch.device("cpu"))
    source = open_source(LoaderChoice("dali", ""), files, torch.arange(6), form, "none", 6, 1)
    (batch,) = source.batches([Step(torch.arange(6), Views())])
    difference = (batch.images * 255 - files.read(torch.arange(6))).abs()
    assert difference.max() <= 1.01, "Pillow rounds to a level between its two passes"
    assert difference[5].max() < 1e-3, "of the right size: not touched"
