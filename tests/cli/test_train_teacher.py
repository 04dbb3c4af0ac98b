"""dfkd-train-teacher on a folder of tiny images: files written, last line JSON, the test set read once and last."""

import json

import numpy as np
import pytest
from PIL import Image

from dfkd.cli import train_teacher
from dfkd.cli.options import command
from dfkd.teachers import checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (root / name).mkdir()
        for index in range(40):
            pixels = random.integers(0, 100, (16, 16, 3)) + 120 * label
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")
    return root


def call(*argv: str) -> int:
    return command(train_teacher.Options, train_teacher.run, train_teacher.COMMAND, argv)


def test_trains_and_writes(data, tmp_path, capsys, monkeypatch):
    read = []
    original = train_teacher.load
    monkeypatch.setattr(train_teacher, "load", lambda *args: (read.append(args[1]), original(*args))[1])
    options = [
        "--architecture",
        "resnet8",
        "--input-size",
        "16",
        "--epochs",
        "2",
        "--batch-size",
        "16",
        "--augment",
        "none",
    ]
    assert call("--data", f"imagefolder:{data}", "--out", str(tmp_path), *options) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["accuracy"] == 1.0 and result["test_images"] == 16
    assert read == ["train", "validation", "test"]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["number"] for line in log] == [1, 2]
    assert log[-1]["validation_accuracy"] == result["validation_accuracy"]
    assert json.loads((tmp_path / "settings.json").read_text())["options"]["epochs"] == 2
    teacher = checkpoint.load(None, tmp_path)
    assert (teacher.class_names, teacher.input_size) == (("dark", "light"), 16)
    # Half of the pixels lie around 50 of 255, half around 170.
    assert teacher.mean == pytest.approx((0.43,) * 3, abs=0.01)
    assert teacher.std == pytest.approx((0.26,) * 3, abs=0.01)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--data", "digits-on-photos", "--architecture", "resnet9"], "resnet8"),
        (["--data", "mnist", "--architecture", "resnet8"], "digits-on-photos"),
        (["--data", "digits-on-photos", "--architecture", "resnet8", "--schedule", "linear"], "onecycle"),
        (["--data", "digits-on-photos", "--architecture", "resnet8", "--epochs", "0"], "at least 1"),
    ],
)
def test_errors_before_work(argv, message, tmp_path, capsys):
    assert call("--out", str(tmp_path / "out"), *argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "result.json").exists()


def test_unwritable_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert call("--data", "digits-on-photos", "--architecture", "resnet8", "--out", str(tmp_path / "file" / "out")) == 2
    assert "cannot write" in capsys.readouterr().err
