import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from dfkd.config import IMAGE_FORMATS
from dfkd.errors import UsageError
from dfkd.data.shards import open_folder, read_folder, require_space, required_bytes
from tests.shard_folders import CLASS_NAMES, contents, fill, make, open_for_writing, sample

ROOT = Path(__file__).parents[2]


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


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    make(tmp_path)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    images, records = sample(range(10), 8)
    assert [item["__key__"] for item in samples] == [f"{i:08d}" for i in range(10)]
    assert [item["cls"] for item in samples] == [record.label for record in records]
    assert [item["json"]["prompt"] for item in samples] == [record.prompt for record in records]
    assert all(np.array_equal(item["png"], image) for item, image in zip(samples, images, strict=True))


# Every file is flushed twice, itself and then its folder's entry: flushes 1 and 2 are the manifest's, 3 and 4 the first
# shard's, 5 and 6 its index's, 7 and 8 the manifest's again, and so on. One child per moment dies before that flush.
KILLED_WRITERS = """
import os, signal, sys
from pathlib import Path
from tests.shard_folders import fill, open_for_writing
flush = os.fsync
def write(path, moment):
    left = [moment]
    def dying(file):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(file)
    os.fsync = dying
    with open_for_writing(path) as folder:
        fill(folder)
for moment in map(int, sys.argv[2:]):
    child = os.fork()
    if not child:
        write(Path(sys.argv[1]) / str(moment), moment)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


def test_a_killed_writer_leaves_nothing_half_done(tmp_path: Path) -> None:
    whole = [0, 1, 2]
    missing_after = {1: whole, 3: whole, 4: whole, 5: whole, 7: whole, 9: [1, 2], 16: [2]}
    subprocess.run(
        [sys.executable, "-c", KILLED_WRITERS, str(tmp_path), *map(str, missing_after)], cwd=ROOT, check=True
    )
    make(tmp_path / "whole")
    for moment, missing in missing_after.items():
        path = tmp_path / str(moment)
        with open_for_writing(path) as folder:
            assert folder.missing() == missing, f"killed at flush {moment}"
            assert not list(path.glob("*.partial"))
            fill(folder)
        assert contents(path) == contents(tmp_path / "whole")


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


def test_a_damaged_image_is_named_by_file_and_id(tmp_path: Path) -> None:
    index = open_folder(make(tmp_path))
    victim = tmp_path / "shard-00001.tar"
    data = victim.read_bytes()
    start = data.index(b"\x89PNG", data.index(b"00000005.png"))
    victim.write_bytes(data[:start] + bytes(64) + data[start + 64 :])
    with pytest.raises(UsageError, match=r"shard-00001\.tar: image 5 "):
        index.read(torch.arange(10))


def test_other_settings_are_refused_naming_both_values(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(UsageError) as refusal:
        open_for_writing(tmp_path, count=11, seed=8, sampler={"name": "ddim", "steps": 30})
    assert "count is 10 there and 11 here" in str(refusal.value)
    assert "seed is 7 there and 8 here" in str(refusal.value)
    assert "sampler.steps is 20 there and 30 here" in str(refusal.value)
    assert "sampler.name" not in str(refusal.value)


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


@pytest.mark.parametrize("manifest", ["{", "[]", "{}", '{"version": 1, "shards": []}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UsageError, match="damaged"):
        read_folder(tmp_path)


def test_an_unfinished_folder_and_none_at_all_are_refused(tmp_path: Path) -> None:
    with open_for_writing(tmp_path) as folder:
        folder.write(0, *sample(range(4), 8))
    with pytest.raises(UsageError, match="1 of 3 shards"):
        open_folder(tmp_path)
    with pytest.raises(UsageError, match="cannot read"):
        open_folder(tmp_path / "elsewhere")


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    manifest = json.loads((make(tmp_path) / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(UsageError, match="version 99"):
        open_folder(tmp_path)


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
