"""Class folders, list files and the data sets of others, as people have them: classes by name, or refused."""

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd.data import ImageFiles, list_file, list_folder
from dfkd.data.array_files import cifar_files, idx_files, list_cifar, list_idx
from dfkd.data.class_folders import words_of
from dfkd.errors import UsageError
from tests.shard_folders import class_folders


def test_images_may_lie_deeper_and_what_is_not_read_is_counted(tmp_path: Path) -> None:
    class_folders(tmp_path, ("cat/images", "dog/a"))
    class_folders(tmp_path, ("dog/b", "dog/.thumbnails", "__MACOSX/cat"))
    for name in ("cat/photo.heic", "cat/photo.xmp", "dog/a/notes.txt", "loose.png"):
        (tmp_path / name).write_bytes(b"")
    found = list_folder(tmp_path)
    assert found.class_names == ("cat", "dog") and found.labels == [0] * 4 + [1] * 8
    assert found.passed_over == {".heic": 1, ".xmp": 1, ".png beside the class folders": 1}
    assert "1 .heic" in found.described()


def test_a_class_whose_files_are_not_read_is_named_with_what_is_there(tmp_path: Path) -> None:
    class_folders(tmp_path, ("cat",))
    (tmp_path / "dog").mkdir()
    for number in range(3):
        (tmp_path / "dog" / f"{number}.heic").touch()
    with pytest.raises(UsageError, match=r"no image of dog \(but 3 \.heic\)"):
        list_folder(tmp_path)


@pytest.mark.parametrize("suffix", ["tif", "gif", "avif", "ppm", "JPEG", "webp", "jp2"])
def test_files_that_pillow_reads_are_images(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / "cat" / f"a.{suffix}")
    image = ImageFiles(list_folder(tmp_path), 8).read(torch.tensor([0]))
    assert (image[0, :, 4, 4].float() - torch.tensor([200.0, 100, 50])).abs().max() <= 6  # lossy formats


def test_tiny_imagenet_is_read_in_its_own_layout(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", ("n02/images", "n01/images"))
    class_folders(tmp_path / "val", ("images",))
    rows = [f"{number}.png\t{name}\t0\t0\t7\t7" for number, name in enumerate(("n02", "n01", "n02"))]
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    found = list_folder(tmp_path / "val")
    assert found.class_names == list_folder(tmp_path / "train").class_names == ("n01", "n02")
    assert found.labels == [1, 0, 1] and [file.name for file in found.images] == ["0.png", "1.png", "2.png"]  # type: ignore[union-attr]


def test_wordnet_numbers_take_the_words_of_a_file_beside_them(tmp_path: Path) -> None:
    names = ("n02012849", "n01440764", "n03126707")
    class_folders(tmp_path / "train", names)
    assert list_folder(tmp_path / "train").class_names == tuple(sorted(names))
    (tmp_path / "words.txt").write_text("n01440764\ttench, Tinca tinca\nn02012849\tcrane\nn03126707\tcrane\n")
    wanted = ("tench", "crane (n02012849)", "crane (n03126707)")
    assert list_folder(tmp_path / "train").class_names == wanted


@pytest.mark.parametrize(
    ("lines", "names", "labels"),
    [
        ("jpg/a.png 0\njpg/b.png 1\njpg/c.png 2", ("0", "1", "2"), [0, 1, 2]),  # a shared folder
        ("jpg/a.png 1\njpg/b.png 3", ("1", "3"), [0, 1]),  # from one, with a gap
        ("x/cat/a.png 4\nx/dog/b.png 9\ny/cat/c.png 4", ("cat", "dog"), [0, 1, 0]),
        ("a b/a b.png\t0\nc/d.png 1", ("a b", "c"), [0, 1]),
        ("cat/a.png 0\nx/b.png 1\ny/c.png 1", ("0", "1"), [0, 1, 1]),  # one class has no folder of its own
    ],
)
def test_classes_of_lists(tmp_path: Path, lines: str, names: tuple[str, ...], labels: list[int]) -> None:
    (tmp_path / "list.txt").write_text(lines)
    found = list_file(tmp_path / "list.txt").compact()
    assert found.class_names == names and list(found.labels) == labels


@pytest.mark.parametrize(
    ("line", "words"), [("a.png -1", "1 of 2 labels are -1: .*hidden"), ("a.png 3000000000", "label 3000000000"),
                        ("a.png", "line 2: 'a.png'"), ("a.png 1.5", "line 2")]
)  # fmt: skip
def test_labels_that_are_none_are_refused(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "list.txt").write_text(f"b.png 0\n{line}\n")
    with pytest.raises(UsageError, match=words):
        list_file(tmp_path / "list.txt")


def cifar(folder: Path, name: str, labels: list[int], key: bytes = b"labels") -> None:
    """A batch as torchvision's archives have it, of NumPy before 2.0: planes of red, green and blue."""
    data = np.zeros((len(labels), 3, 32, 32), np.uint8)
    data[:, 0], data[:, 2, :, 0] = np.array(labels)[:, None, None], 99
    folder.mkdir(exist_ok=True)
    pickled = pickle.dumps({b"data": data.reshape(-1, 3072), key: labels}, protocol=2)
    (folder / name).write_bytes(pickled.replace(b"numpy._core.", b"numpy.core."))


def test_cifar_pickles(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    cifar(folder, "data_batch_1", [1, 0])
    cifar(folder, "data_batch_2", [1])
    cifar(folder, "test_batch", [0])
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"airplane", b"automobile"]}, protocol=2))
    files = cifar_files(tmp_path)
    assert {split: len(found) for split, found in files.items()} == {"train": 2, "test": 1}
    found = list_cifar(files["train"])
    assert found.class_names == ("airplane", "automobile") and found.labels == [1, 0, 1]
    pixels = ImageFiles(found, 32).read(torch.arange(3))
    assert pixels[:, 0, 5, 5].tolist() == [1, 0, 1] and (pixels[:, 2, :, 0] == 99).all()


def test_cifar_100_and_binary_files(tmp_path: Path) -> None:
    cifar(tmp_path / "cifar-100-python", "train", [7, 3], b"fine_labels")
    found = list_cifar(cifar_files(tmp_path)["train"])
    assert len(found.class_names) == 100 and found.occurring() == ["bear", "beetle"] and found.labels == [7, 3]
    rows = np.zeros((2, 3074), np.uint8)
    rows[:, 1], rows[:, 2] = (5, 6), 200
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "test.bin").write_bytes(rows.tobytes())
    binary = list_cifar(cifar_files(tmp_path / "bin")["test"])
    assert list(binary.labels) == [5, 6] and np.array(binary.images[0])[0, 0].tolist() == [200, 0, 0]
    (tmp_path / "bin" / "test.bin").write_bytes(b"x" * 3000)
    with pytest.raises(UsageError, match="3000 bytes are not rows of 3074"):
        list_cifar([tmp_path / "bin" / "test.bin"])


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("harm"),)


def test_a_pickle_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Harmful()}))
    with pytest.raises(UsageError, match=r"test_batch is no file of CIFAR: it holds a \S+, which is no array"):
        list_cifar([tmp_path / "test_batch"])
    assert not (tmp_path / "harm").exists()


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("first", "name"),
    [((5, 0, 4, 1, 9, 2, 1, 3, 1, 4), "five"), ((9, 0, 0, 3, 0, 2, 7, 2, 5, 5), "ankle boot"), ((3, 1) * 5, "3")],
)
def test_idx_files_are_named_by_their_labels(tmp_path: Path, first: tuple[int, ...], name: str) -> None:
    images = np.arange(10 * 28 * 28).reshape(10, 28, 28) % 251
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.array(first)))
    (files,) = idx_files(tmp_path).values()
    found = list_idx(files)
    assert found.class_names[found.labels[0]] == name
    pixels = ImageFiles(found, 28).read(torch.arange(10))
    assert torch.equal(pixels[:, 1], torch.tensor(images, dtype=torch.uint8))
    files[1].write_bytes(idx(np.array(first[:9])))
    with pytest.raises(UsageError, match=r"holds 10 images: .* 9 labels"):
        list_idx(files)
    files[1].write_bytes(b"<html>")
    with pytest.raises(UsageError, match="is no idx file"):
        list_idx(files)


def test_classes_json_names_the_labels_of_idx_files(tmp_path: Path) -> None:
    """As of a part of Fashion-MNIST, whose first labels are not the whole set's, or of letters, numbered from 1."""
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((3, 4, 4))))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array((2, 1, 2))))
    (files,) = idx_files(tmp_path).values()
    for names, wanted in ((["-", "a", "b"], ("-", "a", "b")), ({"b": 2, "a": 1}, ("", "a", "b"))):
        (tmp_path / "classes.json").write_text(json.dumps(names))
        found = list_idx(files)
        assert found.class_names == wanted and not found.numbered and found.occurring() == ["a", "b"]
    (tmp_path / "classes.json").write_text(json.dumps({"a": 1, "b": 1}))
    with pytest.raises(UsageError, match=r"classes\.json gives several names one label"):
        list_idx(files)


@pytest.mark.parametrize(
    ("missing", "first", "last"), [(False, "tench", "toilet tissue"), (True, "n01440764", "n15075141")]
)
def test_the_folders_of_imagenet_are_called_as_its_teachers_classes_are(missing: bool, first: str, last: str) -> None:
    """Of the 1 000 numbers the first and the last are enough to know them, if none is missing."""
    names = ["n01440764", *(f"n02{number:06d}" for number in range(998 - missing)), "n15075141"]
    found = words_of(Path("nowhere"), names)
    assert (found[0], found[-1], len(set(found))) == (first, last, 1000 - missing)
