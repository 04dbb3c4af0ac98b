"""Files on a disk that is full or cannot be written."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd.errors import UsageError
from dfkd.files import PARTIAL, make_writable, replace_file, replace_text


def test_a_folder_is_proved_without_leaving_anything(tmp_path: Path) -> None:
    make_writable(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "folder"]
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write to "):
        make_writable(tmp_path / "file")


def test_a_write_that_fails_names_the_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    replace_text(path := tmp_path / "settings.json", "old")

    def full(file: Any) -> None:
        with open("/dev/full", "wb", buffering=0) as device:
            torch.save({"weights": torch.zeros(1000)}, device)

    with pytest.raises(OSError, match="No space left") as error:
        replace_file(path, full)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["settings.json"]


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.with_name(path.name + PARTIAL).write_text("half")
    replace_text(path, "whole")
    assert os.listdir(tmp_path) == ["settings.json"] and path.read_text() == "whole"
