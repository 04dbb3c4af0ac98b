"""Real data: the splits share nothing, are balanced, and are the same at every call."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd.data import Form, ImageFiles, LoaderChoice, Pool, Step, Views, dali_installed, list_folder, open_source
from dfkd.errors import UsageError
from dfkd.evaluation import (
    check_data,
    class_names_of,
    described,
    learned_from,
    open_images,
    open_splits,
    open_test,
)
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


@pytest.fixture
def splits(tmp_path):
    """Folders of a split each, as people name them; a flat image per file, its class's number in red."""

    def make(**classes):
        for split, names in classes.items():
            for label, name in enumerate(names):
                (tmp_path / split / name).mkdir(parents=True)
                for index in range(10):
                    Image.new("RGB", (8, 8), (label, index, 0)).save(tmp_path / split / name / f"{index}.png")
        return tmp_path

    return make


ANIMALS = ("cat", "dog", "owl")


@pytest.mark.parametrize("suffix", ["", "/{split}"])
@pytest.mark.parametrize(
    "folders, counts, test",
    [
        (("train", "validation", "test"), (30, 30, 30), "test"),
        (("train", "valid", "test"), (30, 30, 30), "test"),
        (("train", "val", "test"), (30, 30, 30), "test"),
        (("train", "test"), (27, 3, 30), "test"),
        (("train", "val"), (27, 3, 30), "val"),  # ImageNet's
    ],
)
def test_layouts_are_known(splits, folders, counts, test, suffix):
    root = splits(**dict.fromkeys(folders, ANIMALS))
    opened = open_splits(f"imagefolder:{root}{suffix}", 8)
    assert tuple(len(opened[split].labels) for split in SPLITS) == counts
    assert described(opened["test"]) == f"30 images of 3 classes in {root / test}"
    assert len(open_test(f"imagefolder:{root}{suffix}", "test", 8).labels) == 30


def test_hidden_answers_are_no_test(splits):
    """Tiny-ImageNet's and ImageNet's test/ have no class folders: their val/ is the test."""
    root = splits(train=ANIMALS, val=ANIMALS, test=("images",))
    assert described(open_splits(str(root), 8)["test"]).endswith("/val")
    with pytest.raises(UsageError, match=r"no images for split 'test' .* there is no \S*other/test"):
        splits(**{"other/train": ANIMALS, "other/test": ("images",)})
        open_splits(f"imagefolder:{root}/other/{{split}}", 8)


@pytest.mark.parametrize("more", [{}, {"test": ("images",)}, {"notes": ("a",)}])
def test_a_training_folder_is_no_class(splits, more):
    """Its folders are; without labelled test images beside it there is nothing to test a teacher on."""
    root = splits(train=ANIMALS, **more)
    with pytest.raises(UsageError, match=r"no images for split 'test' .* there is no test in"):
        open_splits(str(root), 8)
    assert class_names_of(str(root)) == ANIMALS
    vehicles = splits(**{"vehicles/train": ("images",), "vehicles/car": ("images",)})
    assert class_names_of(f"imagefolder:{vehicles}/vehicles") == ("car", "train")


def test_classes_of_later_splits_go_by_name_in_the_order_of_train(splits):
    root = splits(train=("cat", "dog", "owl"), val=("cat", "owl"), test=("owl",))
    opened = open_splits(f"imagefolder:{root}", 8)
    assert {images.class_names for images in opened.values()} == {ANIMALS}
    assert opened["validation"].labels.tolist() == [0] * 10 + [2] * 10 and set(opened["test"].labels.tolist()) == {2}
    assert described(opened["test"]).endswith("none of cat, dog")
    splits(**{"more/train": ANIMALS, "more/test": ("ant", *ANIMALS)})
    with pytest.raises(UsageError, match=r"more/test has images of ant: the classes of .* are cat, dog"):
        open_splits(f"imagefolder:{root}/more/{{split}}", 8)


def test_numbers_of_flat_lists_are_the_classes_of_the_training_list(folder):
    (folder / "flat").mkdir()
    for index in range(6):
        Image.new("RGB", (8, 8)).save(folder / "flat" / f"{index}.png")
    train = [f"{name}/{i:02d}.png {label}" for label, name in enumerate(("bird", "10")) for i in range(20)]
    (folder / "a_train.txt").write_text("\n".join(train))
    (folder / "a_test.txt").write_text("\n".join(f"flat/{i}.png {i % 2}" for i in range(6)))
    opened = open_splits(f"list:{folder}/a_{{split}}.txt", 8)
    assert opened["test"].class_names == ("bird", "10") and opened["test"].labels.tolist() == [0, 1] * 3
    assert open_test(f"list:{folder}/a_{{split}}.txt", "test", 8).class_names == ("bird", "10")
    (folder / "a_test.txt").write_text("flat/0.png 2\nflat/1.png 0\n")
    with pytest.raises(UsageError, match=r"a_test\.txt has images of 2: .* are bird, 10"):
        open_splits(f"list:{folder}/a_{{split}}.txt", 8)


def test_every_file_of_a_list_is_there_before_training(folder):
    lines = [f"{name}/{i:02d}.png {label}" for label, name in enumerate(("2", "10", "bird")) for i in range(30)]
    (folder / "all.txt").write_text("\n".join(lines))
    with pytest.raises(UsageError, match=r"\d+ of \d+ images cannot be read: \S*\.png: No such file"):
        open_splits(f"list:{folder}/all.txt", 8)


def test_some_classes_are_taken_by_name_in_the_order_given(splits, tmp_path):
    root = splits(train=ANIMALS, test=("cat", "dog"))
    (tmp_path / "some.txt").write_text("owl\ncat\n")
    for chosen in ("owl,cat", f"@{tmp_path}/some.txt"):
        opened = open_splits(f"imagefolder:{root}?classes={chosen}", 8)
        assert opened["train"].class_names == opened["test"].class_names == ("owl", "cat")
        assert opened["test"].labels.tolist() == [1] * 10
        assert (opened["train"].read(torch.tensor([0]))[0, 0] == 2).all()
    assert class_names_of(f"imagefolder:{root}?classes=owl,cat") == ("owl", "cat")
    for words, message in (("classes=owl,cad", "no class 'cad': did you mean cat"), ("class=cat", "chooses nothing")):
        with pytest.raises(UsageError, match=message):
            open_splits(f"imagefolder:{root}?{words}", 8)


def test_a_test_of_a_path_without_splits_is_all_of_it_but_what_its_teacher_learned_from(folder, tmp_path):
    name = f"imagefolder:{folder}"
    assert len(open_test(name, "test", 8).labels) == 60
    (tmp_path / ".teacher").mkdir()
    (tmp_path / ".teacher" / "config.json").write_text(json.dumps({"data": f"imagefolder:{folder}/../{folder.name}"}))
    (tmp_path / ".student" / "last").mkdir(parents=True)
    settings = {"options": {"teacher_checkpoint": str(tmp_path / ".teacher")}}
    (tmp_path / ".student" / "settings.json").write_text(json.dumps(settings))
    learned = learned_from(tmp_path / ".teacher", None, "timm:resnet50")
    assert learned_from(tmp_path / ".student" / "last") == learned
    held_out = open_test(name, "test", 8, learned)
    assert torch.equal(held_out.read(torch.arange(12)), open_splits(name, 8)["test"].read(torch.arange(12)))
    assert "(test: 12 of 60)" in described(held_out)
    assert len(open_test(name, "all", 8, learned).labels) == 60


@pytest.mark.parametrize(
    "inner, words",
    [("", "has one class, photos: a teacher tells classes apart"), ("/photos", "no image in .*10 .png beside")],
)
def test_what_no_teacher_can_learn_from_is_refused(splits, inner, words):
    root = splits(animals=("photos",))
    with pytest.raises(UsageError, match=words):
        open_splits(f"imagefolder:{root}/animals{inner}", 8)


def test_a_class_without_images_to_learn_from_is_named(splits):
    root = splits(train=ANIMALS, test=ANIMALS)
    for file in (root / "train" / "dog").iterdir():
        file.rename(file.with_suffix(".heic"))
    (root / "test" / "dog" / "0.png").unlink()
    with pytest.raises(UsageError, match=r"no images to learn dog from: .*not read there: 10 \.heic"):
        open_splits(str(root), 8)


@pytest.fixture
def parquet(folder):
    """A writer of Parquet files of the folder's images of class 2."""
    pyarrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")

    def write(name, labels, names=(), image="image", label="label"):
        data = (folder / "2" / "00.png").read_bytes()
        table = pyarrow.table({image: [{"bytes": data, "path": None}] * len(labels), label: labels})
        features = {"info": {"features": {label: {"names": list(names)}}}} if names else {}
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        writer.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), folder / name)
        return f"parquet:{folder}"

    return write


def test_the_splits_of_hugging_faces_files_are_told_by_their_names(parquet):
    parquet("data/train-00000-of-00002.parquet", [0, 1] * 10, ANIMALS[:2], "img", "fine_label")
    parquet("data/train-00001-of-00002.parquet", [0, 1] * 10, ANIMALS[:2], "img", "fine_label")
    name = parquet("data/test-00000-of-00001.parquet", [1] * 5, ANIMALS[:2], "img", "fine_label")
    for form in ("", "/data", "/data/{split}-*.parquet"):
        opened = open_splits(name + form, 8)
        assert [len(opened[split].labels) for split in SPLITS] == [36, 4, 5]
        assert opened["test"].labels.tolist() == [1] * 5 and class_names_of(name + form) == ("cat", "dog")
    parquet("x/train/0000.parquet", [0, 1] * 10, ANIMALS[:2])
    parquet("x/test/0000.parquet", [0] * 3, ANIMALS[:2])
    assert [len(images.labels) for images in open_splits(name + "/x", 8).values()] == [18, 2, 3]


@pytest.mark.parametrize(
    "labels, names, words",
    [
        ([0, -1, -1], ("cat", "dog"), "2 of 3 labels are -1: .*hidden"),
        ([0, 2], ("cat", "dog"), "has the label 2: it names 2 classes, 0 to 1"),
        ([0, None], (), "1 rows have no image or no label: the first is row 1"),
        ([0.5, 1.5], (), "a label is 0.5"),
    ],
)
def test_labels_of_parquet_that_are_none_are_refused(parquet, labels, names, words):
    name = parquet("a.parquet", labels, names)
    with pytest.raises(UsageError, match=words):
        open_test(name, "test", 8)


def test_labels_of_parquet_may_be_words_or_numbers_from_one(parquet, folder):
    assert open_test(parquet("a.parquet", ["dog", "cat", "dog"]), "test", 8).labels.tolist() == [1, 0, 1]
    (folder / "a.parquet").unlink()
    numbers = open_test(parquet("b.parquet", [1, 3, 3]), "test", 8)
    assert (numbers.class_names, numbers.labels.tolist()) == (("1", "3"), [0, 1, 1])


CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 as Parquet files is not there")
def test_cifar_10_of_hugging_face(tmp_path):
    images = open_test(f"parquet:{CIFAR10}?classes=truck,cat", "test", 32)
    assert (len(images.labels), images.class_names) == (2000, ("truck", "cat"))
    assert images.read(torch.arange(4)).shape == (4, 3, 32, 32)


def test_arrays_are_read_through_their_spec(tmp_path):
    images, labels = np.arange(40 * 16).reshape(40, 4, 4) % 256, np.arange(40) % 4
    for word in ("train", "t10k"):
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
            (tmp_path / f"{word}-{kind}-ubyte").write_bytes(header + values.astype(np.uint8).tobytes())
    opened = open_splits(f"mnist:{tmp_path}", 4)
    assert [len(opened[split].labels) for split in SPLITS] == [36, 4, 40]
    assert torch.equal(opened["test"].read(torch.arange(40))[:, 2], torch.tensor(images, dtype=torch.uint8))
    with pytest.raises(UsageError, match="holds no batches of CIFAR"):
        open_splits(f"cifar:{tmp_path}", 4)
