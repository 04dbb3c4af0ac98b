"""Class folders, list files, and several folders as one pool."""

from pathlib import Path

import pytest
import torch

from dfkd.data import (
    ImageFiles,
    ShardFolder,
    ShardPool,
    export_imagefolder,
    list_file,
    list_folder,
    match_network,
    open_data,
    open_folder,
    read_all,
)
from dfkd.errors import UsageError
from tests.shard_folders import CLASS_NAMES, class_folders, make, sample


def everything(data: object) -> torch.Tensor:
    return data.read(torch.arange(len(data.ids)))  # type: ignore[attr-defined, no-any-return]


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:60])


def test_classes_are_folders_in_the_order_of_their_numbers_or_of_classes_json(tmp_path: Path) -> None:
    class_folders(tmp_path, ("10", "9", "cat"))
    assert list_folder(tmp_path).class_names == ("9", "10", "cat")
    (tmp_path / "classes.json").write_text('{"cat": 0, "9": 2, "10": 1}')
    assert list_folder(tmp_path).class_names == ("cat", "10", "9")
    (tmp_path / "classes.json").write_text('["cat", "9"]')
    with pytest.raises(UsageError, match="there are folders 10"):
        list_folder(tmp_path)


def test_what_is_no_class_and_no_image_is_passed_over_and_empty_classes_are_named(tmp_path: Path) -> None:
    class_folders(tmp_path, ("cat", "dog"))
    before = list_folder(tmp_path)
    class_folders(tmp_path, (".cache", "__MACOSX"))
    for name in ("._0.png", "notes.txt"):
        (tmp_path / "cat" / name).write_bytes(b"")
    assert list_folder(tmp_path) == before
    (tmp_path / "fox").mkdir()
    with pytest.raises(UsageError, match="has no image of fox"):
        list_folder(tmp_path)
    assert list_folder(tmp_path, complete=False).class_names == ("cat", "dog", "fox")
    with pytest.raises(UsageError, match="no image in"):
        list_folder(tmp_path / "fox")


def test_classes_of_a_list_have_names_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("cat/a.png 0\ndog/b.png 1\n")
    assert list_file(file).class_names == ("cat", "dog")
    file.write_text("all/a.png 0\nall/b.png 1\n")
    assert list_file(file).class_names == ("0", "1")
    file.write_text("1/a.png 0\nx/b.png 1\ny/c.png 1\n")
    assert list_file(file).class_names == ("0", "1")


def test_image_files_are_cut_and_resized_when_read(tmp_path: Path) -> None:
    files = ImageFiles(list_folder(class_folders(tmp_path, sizes=(9, 16))), 8)
    assert everything(files).shape == (12, 3, 8, 8) and files.labels.tolist() == [i // 4 for i in range(12)]
    digest = ImageFiles(files.listing, 8).digest
    damage(tmp_path / "two" / "1.png")
    assert ImageFiles(files.listing, 8).digest != digest
    with pytest.raises(UsageError, match=r"cannot read \S*two/1\.png"):
        everything(files)
    (tmp_path / "two" / "1.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="are no image that Pillow knows"):
        everything(files)


def test_one_folder_of_shards_is_that_folder(tmp_path: Path) -> None:
    data = open_data(str(make(tmp_path)))
    assert isinstance(data, ShardPool) and data.digest == open_folder(tmp_path).digest
    assert match_network(data, CLASS_NAMES, 32) is data


def test_an_export_that_was_filtered_by_hand_is_what_is_left(tmp_path: Path) -> None:
    shards = open_folder(make(tmp_path))
    export_imagefolder(tmp_path)
    data = open_data([tmp_path / "imagefolder"])
    assert data.class_names == CLASS_NAMES and data.image_size == 8 and data.files == "sized"
    rows = shards.labels.sort(stable=True).indices
    assert torch.equal(everything(data), shards.read(rows)) and torch.equal(data.labels, shards.labels[rows])
    for file in (tmp_path / "imagefolder" / "two").iterdir():
        file.unlink()
    assert export_imagefolder(tmp_path) == 10  # which puts nothing back
    left = open_data([tmp_path / "imagefolder"])
    assert left.labels.tolist() == [0] * 4 + [1] * 3 and left.class_names == CLASS_NAMES and left.digest != data.digest


def test_folders_are_joined_by_the_names_of_their_classes(tmp_path: Path) -> None:
    other = tmp_path / "other"
    with ShardFolder.create_or_open(other, {}, ("two", "zero", "one"), 8, "jpg", 2, 2) as folder:
        folder.write(0, *sample(range(2), 8))  # of the labels 0 and 1, here two and zero
    plain = class_folders(tmp_path / "plain", ("two", "one"))
    data = open_data([plain, make(tmp_path / "shards"), other])
    shards = open_folder(tmp_path / "shards")
    assert data.class_names == CLASS_NAMES
    assert data.labels.tolist() == [1] * 4 + [2] * 4 + shards.labels.tolist() + [2, 0]
    assert len(set(data.ids.tolist())) == 20
    images = everything(data)
    assert torch.equal(images[8:18], everything(shards)) and torch.equal(images[18:], everything(open_folder(other)))
    mixed = torch.tensor([19, 3, 8, 0, 17])
    assert torch.equal(data.read(mixed), images[mixed])
    assert [len(part) for part in data.encoded(mixed)] == [len(data.encoded(mixed[[i]])[0]) for i in range(5)]
    assert len({open_data([plain, other]).digest, open_data([other, plain]).digest, data.digest}) == 3


def test_images_of_several_sizes_are_fitted_to_the_network(tmp_path: Path) -> None:
    shards, plain = make(tmp_path / "shards"), class_folders(tmp_path / "plain", sizes=(9, 16))
    data = match_network(open_data([shards, plain]), CLASS_NAMES, 6)
    images = everything(data)
    assert torch.equal(images[:10], read_all(open_folder(shards), torch.arange(10), 6))
    assert torch.equal(images[10:], everything(ImageFiles(list_folder(plain), 6)))
    alone = open_data([plain])
    assert (alone.files, alone.image_size) == ("fitted", 9)
    assert torch.equal(everything(match_network(alone, CLASS_NAMES, 6)), images[10:])
    assert data.digest != match_network(open_data([shards, plain]), CLASS_NAMES, 8).digest


def test_classes_come_in_the_networks_order(tmp_path: Path) -> None:
    for path in (make(tmp_path / "shards"), class_folders(tmp_path / "plain", ("one", "two"))):
        data = open_data([path])
        matched = match_network(data, ("two", "one", "zero"), 8)
        assert matched.class_names == ("two", "one", "zero")
        assert [matched.class_names[i] for i in matched.labels] == [data.class_names[i] for i in data.labels]
        assert matched.digest != data.digest and torch.equal(everything(matched), everything(data))
    with pytest.raises(UsageError, match="the teacher has no two"):
        match_network(data, ("one", "zero"), 8)
    with pytest.raises(UsageError, match="the data has no three"):
        match_network(open_data([tmp_path / "shards"]), (*CLASS_NAMES, "three"), 8)


@pytest.mark.parametrize(
    "names, shards, words",
    [
        (("one", "fox"), True, r"plain and \S*shards disagree about the classes: \S*shards has no fox"),
        (("one", "fox"), False, r"plain and \S*first disagree about the classes: \S*first has no fox"),
        ((), True, "no image in"),
    ],
)
def test_classes_that_others_lack_are_refused(tmp_path: Path, names: tuple[str, ...], shards: bool, words: str) -> None:
    first = make(tmp_path / "shards") if shards else class_folders(tmp_path / "first")
    (tmp_path / "plain").mkdir()
    with pytest.raises(UsageError, match=words):
        open_data([first, class_folders(tmp_path / "plain", names)])


def test_shards_of_other_classes_and_a_folder_given_twice_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    with ShardFolder.create_or_open(other, {}, ("one", "two"), 8, "png", 1, 1) as folder:
        folder.write(0, *sample(range(1), 8))
    with pytest.raises(UsageError, match=r"disagree about the classes: \S*other has no zero"):
        open_data([make(tmp_path / "shards"), other])
    with pytest.raises(UsageError, match="given twice"):
        open_data([other, tmp_path / "shards" / ".." / "other"])
    (other / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"shards without manifest\.json"):
        open_data([other])


def test_damaged_image_files_are_named_or_left_out(tmp_path: Path) -> None:
    shards, plain = make(tmp_path / "shards"), class_folders(tmp_path / "plain")
    whole = open_data([shards, plain])
    damage(plain / "one" / "2.png")
    (shards / "shard-00002.tar").unlink()
    with pytest.raises(UsageError, match=r"1 damaged images of 12.*one/2\.png: image 2 .*skip"):
        open_data([plain])
    data = open_data([shards, plain], "skip")
    found = [(bad.file.name, bad.id) for bad in data.left_out]
    assert found == [("shard-00002.tar", 8), ("shard-00002.tar", 9), ("2.png", 2)]
    assert len(data.ids) == len(whole.ids) - 3 and data.digest != whole.digest
    assert open_data([shards, plain], "skip").digest == data.digest
    for file in plain.rglob("*.png"):
        damage(file)
    with pytest.raises(UsageError, match="12 damaged images of 12"):
        open_data([plain], "skip")
