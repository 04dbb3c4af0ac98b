"""Damaged shards: named by file and image, or left out."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dfkd.config import IMAGE_FORMATS
from dfkd.errors import UsageError
from dfkd.data.shards import open_folder, read_folder
from tests.shard_folders import make

START = {"png": b"\x89PNG", "jpg": b"\xff\xd8", "npy": b"\x93NUMPY"}


def without_image_5(path: Path, image_format: str) -> None:
    victim = path / "shard-00001.tar"
    data = victim.read_bytes()
    start = data.index(START[image_format], data.index(f"00000005.{image_format}".encode()))
    victim.write_bytes(data[:start] + bytes(64) + data[start + 64 :])


def cut(path: Path) -> None:
    victim = path / "shard-00001.tar"
    data = victim.read_bytes()
    victim.write_bytes(data[: data.index(b"00000006.png") + 550])  # in the middle of the pixels of image 6


def cut_in_a_header(path: Path) -> None:
    victim = path / "shard-00001.tar"
    data = victim.read_bytes()
    victim.write_bytes(data[: data.index(b"00000006.png") + 100])


def empty(path: Path) -> None:
    (path / "shard-00001.tar").write_bytes(b"")


def absent(path: Path) -> None:
    (path / "shard-00001.tar").unlink()


def other_header(path: Path) -> None:
    victim = path / "shard-00001.tar"
    victim.write_bytes(victim.read_bytes().replace(b"00000006.png", b"0000000X.png"))


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_a_damaged_image_is_named_or_left_out(tmp_path: Path, image_format: str) -> None:
    whole = read_folder(make(tmp_path, image_format=image_format))
    before = open_folder(tmp_path, "skip")
    assert not before.left_out and before.digest == open_folder(tmp_path).digest
    without_image_5(tmp_path, image_format)
    with pytest.raises(UsageError, match=r"shard-00001\.tar was altered.*shard-00001\.tar: image 5 \(.*dfkd-generate"):
        open_folder(tmp_path)
    left = open_folder(tmp_path, "skip")
    assert [(sample.file.name, sample.id) for sample in left.left_out] == [("shard-00001.tar", 5)]
    assert left.ids.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9] and left.digest != before.digest
    assert torch.equal(left.read(torch.arange(9)), whole.images[left.ids])
    assert torch.equal(left.labels, whole.labels[left.ids])
    assert open_folder(tmp_path, "skip").digest == left.digest


@pytest.mark.parametrize(
    "harm, gone",
    [(cut, [6, 7]), (cut_in_a_header, [6, 7]), (empty, [4, 5, 6, 7]), (absent, [4, 5, 6, 7]), (other_header, [6, 7])],
)
def test_a_shard_cut_short_loses_what_follows(tmp_path: Path, harm: Callable[[Path], None], gone: list[int]) -> None:
    whole = read_folder(make(tmp_path))
    harm(tmp_path)
    with pytest.raises(UsageError, match=r"shard-00001\.tar (was altered|is absent)"):
        open_folder(tmp_path)
    left = open_folder(tmp_path, "skip")
    assert [sample.id for sample in left.left_out] == gone
    assert left.ids.tolist() == [i for i in range(10) if i not in gone]
    assert torch.equal(left.read(torch.arange(len(left.ids))), whole.images[left.ids])


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    for shard in tmp_path.glob("shard-*.tar"):
        shard.write_bytes(b"")
    with pytest.raises(UsageError, match="no image that can be read"):
        open_folder(tmp_path, "skip")
