"""dfkd-train-teacher on a folder of tiny images: files written, last line JSON, the test set read once and last."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dfkd import evaluation
from dfkd.cli import train_teacher as cli
from dfkd.files import folder_lock
from dfkd.teachers import Classifier
from dfkd.training import teacher
from tests.cli.small_generate import last_line, status_of
from tests.training.small_run import Killed, equal, lines, result

SMALL = ["--architecture", "resnet8", "--input-size", 16, "--epochs", 3, "--batch-size", 16, "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (root / name).mkdir()
        for index in range(40):
            pixels = random.integers(0, 100, (16, 16, 3)) + 120 * label
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")
    return root


def call(data: Path, out: Path, *more: object) -> int:
    return status_of(cli.main, "--data", f"imagefolder:{data}", "--out", out, *SMALL, *more)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that pixels were read of so far."""
    splits: list[str] = []
    own = evaluation.open_splits

    def open_splits(name: str, size: int) -> dict[str, Any]:
        return {split: watched(split, images) for split, images in own(name, size).items()}

    def watched(split: str, images: Any) -> Any:
        original = images.read

        def read(positions: Any) -> Any:
            splits.extend({split} - set(splits))
            return original(positions)

        monkeypatch.setattr(images, "read", read)
        return images

    monkeypatch.setattr(evaluation, "open_splits", open_splits)
    return splits


def test_trains_and_writes(data: Path, tmp_path: Path, capsys: Any, read: list[str]) -> None:
    assert call(data, tmp_path) == 0
    found = last_line(capsys.readouterr().out)
    assert found["accuracy"] == 1.0 and found["test_images"] == 16 and found == result(tmp_path)
    assert read == ["train", "validation", "test"]
    log = lines(tmp_path)
    assert [line["step"] for line in log if "validation_accuracy" in line] == list(range(1, 11))  # 3 x 56 / 16
    trained = Classifier.from_pretrained(tmp_path)
    assert (trained.class_names, trained.input_size) == (("dark", "light"), 16)
    # Half of the pixels lie around 50 of 255, half around 170.
    assert trained.mean == pytest.approx((0.43,) * 3, abs=0.01) and trained.std == pytest.approx((0.26,) * 3, abs=0.01)
    names = ["config.json", "log.jsonl", "model.safetensors", "result.json", "settings.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    read.clear()
    assert call(data, tmp_path) == 0  # finished: its result again
    assert last_line(capsys.readouterr().out) == found and read == []
    assert call(data, tmp_path, "--lr", 0.05) == 2
    assert "lr is 0.1 there and 0.05 here" in capsys.readouterr().err and read == []
    assert json.loads((tmp_path / "settings.json").read_text())["options"]["lr"] == 0.1


def dies(patch: pytest.MonkeyPatch, name: str) -> None:
    """The training dies where it would call one of its functions."""

    def die(*given: Any) -> None:
        raise Killed

    patch.setattr(teacher, name, die)


@pytest.mark.parametrize("name", ["accuracy", "write_result"])
def test_killed_at_its_end_it_comes_to_the_same_files(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Before its first check, before its result, and before the checkpoint goes."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert call(data, whole) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies(patch, name)
        call(data, killed)
    shutil.copy(killed / "checkpoint.pt", tmp_path)
    assert call(data, killed) == 0
    assert equal(whole, killed) and lines(whole) == lines(killed) and not (killed / "checkpoint.pt").exists()
    shutil.copy(tmp_path / "checkpoint.pt", killed)
    before = result(killed)
    assert call(data, killed) == 0 and result(killed) == before and not (killed / "checkpoint.pt").exists()


def test_other_images_of_the_same_name_are_refused(
    data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = shutil.copytree(data, tmp_path / "images")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies(patch, "write_result")
        call(images, tmp_path / "out")
    for file in images.glob("dark/*.png"):  # as another version of the same folder
        Image.new("RGB", (16, 16), (9, 9, 9)).save(file)
    assert call(images, tmp_path / "out") == 2
    assert "training-images is " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "digits-on-photos", "--architecture", "resnet9"], "resnet8"),
        (["--data", "mnist", "--architecture", "resnet8"], "digits-on-photos"),
        (["--data", "digits-on-photos", "--architecture", "resnet8", "--schedule", "linear"], "onecycle"),
        (["--data", "digits-on-photos", "--architecture", "resnet8", "--epochs", "0"], "at least 1"),
    ],
)
def test_errors_before_work(argv: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    assert status_of(cli.main, "--out", tmp_path / "out", "--device", "cpu", *argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_images_without_a_test_split_are_refused_before_the_training(data: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(data, tmp_path / "images" / "train")
    assert call(tmp_path / "images" / "{split}", tmp_path / "out") == 2
    assert "images/test" in capsys.readouterr().err and not (tmp_path / "out" / "log.jsonl").exists()


def test_a_folder_in_use_gets_no_settings(data: Path, tmp_path: Path, capsys: Any) -> None:
    with folder_lock(tmp_path):
        assert call(data, tmp_path) == 2
    assert "is in use" in capsys.readouterr().err and not (tmp_path / "settings.json").exists()


def test_a_folder_that_cannot_be_written(data: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    assert call(data, tmp_path / "file" / "out") == 2
    assert "cannot write" in capsys.readouterr().err
