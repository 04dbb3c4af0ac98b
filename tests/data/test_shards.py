import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dfkd.config import IMAGE_FORMATS
from dfkd.data import open_folder, read_folder, require_space
from dfkd.data.shard_writer import required_bytes
from dfkd.errors import UsageError
from dfkd.runtime import Rank
from tests.shard_folders import CLASS_NAMES, contents, fill, make, open_for_writing, sample


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_what_is_written_is_read_back(tmp_path: Path, image_format: str) -> None:
    pool = read_folder(make(tmp_path, image_format=image_format))
    images, records = sample(range(10), 8)
    assert pool.ids.tolist() == list(range(10))
    assert pool.labels.tolist() == [record.label for record in records]
    assert pool.class_names == CLASS_NAMES
    assert list(pool.records) == records
    assert pool.settings["sampler"] == {"name": "ddim", "steps": 20}
    assert pool.images.dtype == torch.uint8 and pool.images.shape == (10, 3, 8, 8)
    if image_format != "jpg":
        assert np.array_equal(pool.images.permute(0, 2, 3, 1).numpy(), images)


def test_an_index_reads_the_same_pixels_in_any_order(tmp_path: Path) -> None:
    pool, index = read_folder(make(tmp_path)), open_folder(tmp_path)
    positions = torch.tensor([9, 0, 5])
    assert torch.equal(index.read(positions), pool.images[positions])
    assert torch.equal(index.labels, pool.labels) and torch.equal(index.ids, pool.ids)
    assert index.digest == pool.digest


def test_bytes_do_not_depend_on_order_or_time(tmp_path: Path) -> None:
    make(tmp_path / "forwards")
    with open_for_writing(tmp_path / "backwards") as folder:
        for index in reversed(folder.missing()):
            folder.write(index, *sample(folder.layout.ids(index), 8), seconds=1.5)
    assert contents(tmp_path / "forwards") == contents(tmp_path / "backwards")


def killed_writer(path: Path, moment: int) -> None:
    """A process of its own fills the folder and dies before its flush number `moment`."""
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        return
    flush, left = os.fsync, moment

    def dying(file: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(file)

    try:
        os.fsync = dying  # type: ignore[assignment]
        with open_for_writing(path) as folder:
            fill(folder)
    finally:
        os._exit(1)  # which the parent does not expect


# Every file is flushed twice, itself and then its folder's entry: flushes 1 and 2 are the manifest's, 3 and 4 the first
# shard's, 5 and 6 its index's, 7 and 8 the manifest's again, and so on.
@pytest.mark.parametrize("moment, written", [(1, 0), (3, 0), (4, 0), (5, 0), (7, 0), (9, 1), (16, 2)])
def test_a_killed_writer_leaves_nothing_half_done(tmp_path: Path, moment: int, written: int) -> None:
    path = tmp_path / "killed"
    killed_writer(path, moment)
    with open_for_writing(path) as folder:
        assert folder.missing() == [0, 1, 2][written:]
        assert not list(path.glob("*.partial"))
        fill(folder)
    assert contents(path) == contents(make(tmp_path / "whole"))


def test_altered_and_absent_shards_are_missing_and_repaired(tmp_path: Path) -> None:
    before = contents(make(tmp_path))
    victim = tmp_path / "shard-00001.tar"
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    (tmp_path / "shard-00002.tar").unlink()
    with pytest.raises(UsageError, match=r"shard-00001\.tar was altered"):
        read_folder(tmp_path)
    with open_for_writing(tmp_path) as folder:
        assert folder.missing() == [1, 2]
        fill(folder)
    assert contents(tmp_path) == before


def test_other_settings_are_refused_naming_both_values(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(UsageError) as refusal:
        open_for_writing(tmp_path, count=11, seed=8, sampler={"name": "ddim", "steps": 30})
    assert "count is 10 there and 11 here" in str(refusal.value)
    assert "seed is 7 there and 8 here" in str(refusal.value)
    assert "sampler.steps is 20 there and 30 here" in str(refusal.value)
    assert "sampler.name" not in str(refusal.value)


def test_a_continued_folder_gives_back_how_it_was_begun(tmp_path: Path) -> None:
    with open_for_writing(tmp_path, run={"call_size": 64, "threads": 2}) as folder:
        assert folder.run == {"call_size": 64, "threads": 2}
        fill(folder)
    with open_for_writing(tmp_path, run={"call_size": 8, "engines": {}}) as folder:
        assert folder.run == {"call_size": 64, "threads": 2} and folder.missing() == []
        folder.write(0, *sample(range(4), 8))
    assert open_folder(tmp_path).layout.run == {"call_size": 64, "threads": 2}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["run"]  # of a version that recorded none
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with open_for_writing(tmp_path, run={"call_size": 8}) as folder:
        assert folder.run == {}


def test_two_ranks_write_one_folder_and_agree_on_how(tmp_path: Path) -> None:
    first, second = (open_for_writing(tmp_path, rank=Rank(i, 2), run={"call_size": 8 + i}) for i in range(2))
    assert first.run == second.run == {"call_size": 8}
    assert first.missing() == [0, 2] and second.missing() == [1] == first.missing_of_others()
    fill(second)
    second.record(call_size=4)
    fill(first)
    assert first.run == {"call_size": 4}
    first.wait_for_others()
    first.close()
    make(tmp_path / "alone", run={"call_size": 4})
    assert contents(tmp_path / "alone") == contents(tmp_path)


def test_two_writers_are_refused_and_a_stale_lock_is_taken_over(tmp_path: Path) -> None:
    with open_for_writing(tmp_path), pytest.raises(UsageError, match=f"process {os.getpid()} is writing"):
        open_for_writing(tmp_path)
    (tmp_path / ".lock").write_text("4194304")  # as a killed process leaves it
    with open_for_writing(tmp_path) as folder:
        fill(folder)
    assert not (tmp_path / ".lock").exists()


def test_shards_of_unknown_origin_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "shard-00000.tar").write_bytes(b"someone's")
    with pytest.raises(UsageError, match=r"without manifest\.json"):
        open_for_writing(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write to"):
        open_for_writing(tmp_path / "file" / "out")


@pytest.mark.parametrize(
    "manifest, words",
    [
        *((text, "damaged") for text in ("{", "[]", "{}", '{"version": 1, "shards": []}')),
        ('{"version": 99, "shards": [], "settings": {}, "class_names": [], "image_size": 8, "image_format": "png",'
         ' "count": 1, "shard_size": 1}', "version 99"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_read_is_refused(tmp_path: Path, manifest: str, words: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UsageError, match=words) as refusal:
        open_folder(tmp_path)
    assert "delete" not in str(refusal.value)


def test_the_first_images_of_an_unfinished_folder_are_read(tmp_path: Path) -> None:
    with open_for_writing(tmp_path) as folder:  # ten images in shards of four
        for index in (0, 1):
            folder.write(index, *sample(folder.layout.ids(index), folder.layout.image_size), facts={"student": "s"})
        assert (folder.entry(1)["student"], folder.entry(2)) == ("s", {})
    four, eight = open_folder(tmp_path, until=4), open_folder(tmp_path, until=8)
    assert four.ids.tolist() == list(range(4)) and eight.ids.tolist() == list(range(8))
    assert four.digest != eight.digest and four.digest == open_folder(make(tmp_path / "four", count=4)).digest
    with pytest.raises(UsageError, match="it holds 2 of 3 shards"):
        open_folder(tmp_path, until=10)


def test_an_unfinished_folder_and_none_at_all_are_refused(tmp_path: Path) -> None:
    with open_for_writing(tmp_path) as folder:
        folder.write(0, *sample(range(4), 8))
    with pytest.raises(UsageError, match="1 of 3 shards"):
        open_folder(tmp_path)
    with pytest.raises(UsageError, match="cannot read"):
        open_folder(tmp_path / "elsewhere")


@pytest.mark.parametrize("image_format", ["png", "npy"])
def test_space_is_never_underestimated_on_noise(tmp_path: Path, image_format: str) -> None:
    make(tmp_path, image_format=image_format, size=64)
    used = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    # Each tar file ends with up to 10 kB of padding, which a real shard of hundreds of images does not notice.
    assert used - 3 * 10240 <= required_bytes(10, 64, image_format) <= 2 * used


def test_too_little_space_is_refused(tmp_path: Path) -> None:
    require_space(tmp_path / "new" / "folder", 10, 32, "png")
    with pytest.raises(UsageError, match="GB free"):
        require_space(tmp_path / "new" / "folder", 10**12, 512, "png")


START = {"png": b"\x89PNG", "jpg": b"\xff\xd8", "npy": b"\x93NUMPY"}


def without_image_5(path: Path, image_format: str) -> None:
    victim = path / "shard-00001.tar"
    data = victim.read_bytes()
    start = data.index(START[image_format], data.index(f"00000005.{image_format}".encode()))
    victim.write_bytes(data[:start] + bytes(64) + data[start + 64 :])


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
    [
        (lambda data: data[: data.index(b"00000006.png") + 550], [6, 7]),  # in the middle of the pixels of image 6
        (lambda data: data[: data.index(b"00000006.png") + 100], [6, 7]),  # in its header
        (lambda data: data.replace(b"00000006.png", b"0000000X.png"), [6, 7]),
        (lambda data: b"", [4, 5, 6, 7]),
        (None, [4, 5, 6, 7]),
    ],
    ids=["pixels", "header", "name", "empty", "absent"],
)
def test_a_shard_cut_short_loses_what_follows(
    tmp_path: Path, harm: Callable[[bytes], bytes] | None, gone: list[int]
) -> None:
    whole = read_folder(make(tmp_path))
    victim = tmp_path / "shard-00001.tar"
    if harm:
        victim.write_bytes(harm(victim.read_bytes()))
    else:
        victim.unlink()
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
