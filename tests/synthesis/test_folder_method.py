"""Images of a folder as a method: class folders, a plain pool, a list and shards, labelled by folder or by teacher."""

import json

import pytest
import torch
from PIL import Image

from dfkd.config import GenerateConfig
from dfkd.data import open_folder
from dfkd.errors import UsageError
from dfkd.synthesis.methods import make_method
from dfkd.synthesis.run import open_run
from dfkd.synthesis.synthesizer import Synthesizer
from tests.synthesis.small_networks import CLASS_NAMES, classifier


@pytest.fixture(scope="module")
def teacher():
    return classifier()


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Class folders of grey images, whose level tells them apart: 4 of each class."""
    root = tmp_path_factory.mktemp("pool")
    for label, name in enumerate(CLASS_NAMES):
        (root / name).mkdir()
        for i in range(4):
            Image.new("RGB", (8, 8), (60 * label + i,) * 3).save(root / name / f"{i}.png")
    return root


def folder(teacher, path, more="", **settings):
    text = f"folder(path={str(path)!r}{more})"
    return make_method(GenerateConfig.of(method=text, device="cpu", **settings), None, teacher)


def levels(sample):
    return sample.images[:, 0, 0, 0].tolist()


def test_each_image_comes_once_as_it_is_in_an_order_of_the_seed(teacher, pool):
    made = folder(teacher, pool, ", labels=folder")
    assert isinstance(made, Synthesizer) and made.available == 12
    sample = made(range(12), seed=3)
    assert sorted(levels(sample)) == sorted(60 * label + i for label in range(3) for i in range(4))
    assert sample.labels.tolist() == [level // 60 for level in levels(sample)]
    assert [record.class_name for record in sample.records] == [CLASS_NAMES[label] for label in sample.labels]
    assert levels(made([7, 2], seed=3)) == [levels(sample)[7], levels(sample)[2]]
    assert levels(made(range(12), seed=4)) != levels(sample)


def test_the_teacher_labels_a_pool_without_classes(teacher, pool):
    flat = folder(teacher, pool / "one")
    sample = flat(range(4))
    shown = teacher.logits(sample.images.float() / 255)
    assert sorted(levels(sample)) == [60, 61, 62, 63] and sample.labels.tolist() == shown.argmax(1).tolist()
    sure = [record.teacher_probability for record in sample.records]
    assert sure == pytest.approx(shown.softmax(1).max(1).values.tolist(), rel=1e-4)
    assert folder(teacher, pool).available == 12  # however deep they lie
    assert flat([0, 1], labels=[2, 0]).labels.tolist() == [2, 0]


def test_only_some_classes(teacher, pool):
    sample = folder(teacher, pool, ", labels=folder", only="two,zero")(range(8))
    assert sorted(sample.labels.tolist()) == [0] * 4 + [2] * 4
    with pytest.raises(UsageError, match="use labels=folder"):
        folder(teacher, pool, only="two")


def test_a_list_names_classes_or_numbers_them(teacher, pool, tmp_path):
    (tmp_path / "named.txt").write_text("".join(f"{pool / name}/0.png {n}\n" for n, name in enumerate(CLASS_NAMES)))
    named = folder(teacher, tmp_path / "named.txt", ", labels=folder")(range(3))
    assert named.labels.tolist() == [level // 60 for level in levels(named)]
    (tmp_path / "numbers.txt").write_text(f"{pool}/two/0.png 0\n{pool}/two/1.png 1\n{pool}/two/2.png 2\n")
    numbered = folder(teacher, tmp_path / "numbers.txt", ", labels=folder")(range(3))
    assert numbered.labels.tolist() == [level - 120 for level in levels(numbered)]
    (tmp_path / "four.txt").write_text(f"{pool}/two/0.png 0\n{pool}/two/1.png 3\n")
    with pytest.raises(UsageError, match=r"has the label 3.*3 classes, numbered from 0"):
        folder(teacher, tmp_path / "four.txt", ", labels=folder")


def test_shards_of_another_run(teacher, pool, tmp_path):
    first = folder(teacher, pool, ", labels=folder")
    with open_run(first, tmp_path / "first", 12, 3, GenerateConfig.of(device="cpu")) as run:
        run.write()
    again = folder(teacher, tmp_path / "first", ", labels=folder")(range(12), seed=9)
    assert again.labels.tolist() == [level // 60 for level in levels(again)]
    other = teacher.replace(class_names=("two", "one", "zero"))
    turned = folder(other, tmp_path / "first", ", labels=folder")(range(12), seed=9)
    assert turned.labels.tolist() == [2 - label for label in again.labels.tolist()]
    with pytest.raises(UsageError, match="has images of zero, one, two"):
        folder(teacher.replace(class_names=("a", "b", "c")), tmp_path / "first", ", labels=folder")


def test_images_are_fitted_to_the_teacher(teacher, tmp_path):
    Image.new("RGB", (30, 20), (9, 9, 9)).save(tmp_path / "wide.png")
    assert folder(teacher, tmp_path)([0]).images.shape == (1, 3, 8, 8)
    assert folder(teacher, tmp_path, size=16)([0]).images.shape == (1, 3, 16, 16)


def test_the_identity_is_of_bytes_and_not_of_the_place(teacher, pool, tmp_path):
    for path in pool.rglob("*.png"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).write_bytes(path.read_bytes())
    here, there = (folder(teacher, path, ", labels=folder").identity() for path in (pool, tmp_path))
    assert here == there and json.dumps(here)
    Image.new("RGB", (8, 8), (200,) * 3).save(tmp_path / "one" / "0.png")
    assert folder(teacher, tmp_path, ", labels=folder").identity() != here
    assert folder(teacher, pool).identity() != here


def test_what_cannot_be_is_refused_in_words(teacher, pool, tmp_path):
    with (
        pytest.raises(UsageError, match=r"there are 12\. lower --count"),
        open_run(folder(teacher, pool), tmp_path / "many", 13, 0, GenerateConfig.of(device="cpu")),
    ):
        pass
    assert not (tmp_path / "many").exists()
    with pytest.raises(UsageError, match=r"it has 12\. lower --count"):
        folder(teacher, pool)([12])
    for text, words in (
        ("folder", "path is missing: give the folder"),
        ("folder(path=absent)", "no folder absent"),
        ("folder(path=/absent)", "with quotes around paths"),
        ("folder(path=absent, labels=mine)", "one of teacher, folder"),
        (f"folder(path={str(tmp_path)!r})", "no image in"),
    ):
        with pytest.raises(UsageError, match=words):
            make_method(GenerateConfig.of(method=text, device="cpu"), None, teacher)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="1 of 1 images cannot be read"):
        folder(teacher, tmp_path)
    with pytest.raises(UsageError, match="has images of other"):
        (tmp_path / "classes" / "other").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "classes" / "other" / "0.png")
        folder(teacher, tmp_path / "classes", ", labels=folder")


def test_a_folder_of_it_is_a_folder_as_any(teacher, pool, tmp_path):
    with open_run(folder(teacher, pool), tmp_path / "out", 10, 0, GenerateConfig.of(device="cpu")) as run:
        run.write()
    assert len(open_folder(tmp_path / "out").labels) == 10
    assert torch.equal(open_folder(tmp_path / "out").read(torch.arange(10)), folder(teacher, pool)(range(10)).images)
