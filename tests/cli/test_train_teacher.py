"""dfkd-train-teacher on a folder of tiny images: files written, last line JSON, the test set read once and last; and
a run that is killed, repeated or given other settings."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from dfkd.cli import train_teacher
from dfkd.cli.options import command
from dfkd.files import folder_lock
from dfkd.data.loader import dali
from dfkd.teachers import checkpoint

NO_DALI = pytest.mark.skipif(not dali.installed(), reason="NVIDIA DALI is not installed")


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


SMALL = ["--architecture", "resnet8", "--input-size", "16", "--epochs", "2", "--batch-size", "16"]
SMALL += ["--augment", "none", "--device", "cpu"]


def train_on(data, out, *more: str) -> int:
    return call("--data", f"imagefolder:{data}", "--out", str(out), *SMALL, *more)


@pytest.fixture
def read(monkeypatch):
    """The splits that were read so far."""
    splits = []
    original = train_teacher.open_images
    monkeypatch.setattr(train_teacher, "open_images", lambda *args: (splits.append(args[1]), original(*args))[1])
    return splits


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_trains_and_writes(data, tmp_path, capsys, read):
    assert train_on(data, tmp_path) == 0
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
    assert sorted(contents(tmp_path)) == [
        "config.json", "log.jsonl", "model.safetensors", "result.json", "settings.json"
    ]  # fmt: skip


class Killed(BaseException):
    pass


def die(patch, name, time, done):
    """The command dies when it calls one of its functions for the given time: once that is done, or before."""
    original, calls = getattr(train_teacher, name), []

    def dying(*args):
        calls.append(name)
        if len(calls) < time:
            return original(*args)
        if done:
            original(*args)
        raise Killed

    patch.setattr(train_teacher, name, dying)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(("write_checkpoint", 2, False), id="between log and checkpoint of epoch 2"),
        pytest.param(("write_checkpoint", 2, True), id="after epoch 2"),
        pytest.param(("open_images", 3, False), id="before the test"),
        pytest.param(("write_result", 1, True), id="before the checkpoint was removed"),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(data, tmp_path, monkeypatch, where):
    runs = {name: (tmp_path / name, "--epochs", "3", "--augment", "crop-flip") for name in ("whole", "killed")}
    assert train_on(data, *runs["whole"]) == 0
    with monkeypatch.context() as patch:
        die(patch, *where)
        with pytest.raises(Killed):
            train_on(data, *runs["killed"])
    assert (tmp_path / "killed" / "checkpoint.pt").exists()
    assert train_on(data, *runs["killed"]) == 0
    whole, killed = (contents(tmp_path / name) for name in runs)
    assert whole["model.safetensors"] == killed["model.safetensors"] and whole["config.json"] == killed["config.json"]
    assert lines(whole) == lines(killed)
    assert whole.keys() == killed.keys()


def lines(files):
    """The log without its times."""
    found = [json.loads(line) for line in files["log.jsonl"].splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def test_a_finished_run_answers_at_once(data, tmp_path, capsys, read):
    train_on(data, tmp_path)
    before, first = contents(tmp_path), capsys.readouterr().out.splitlines()[-1]
    read.clear()
    assert train_on(data, tmp_path) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(first)
    assert read == [] and contents(tmp_path) == before


def test_other_settings_are_refused_and_change_nothing(data, tmp_path, capsys, monkeypatch, read):
    with monkeypatch.context() as patch:
        die(patch, "write_result", 1, False)
        with pytest.raises(Killed):
            train_on(data, tmp_path)
    for finished in (False, True):
        before = contents(tmp_path)
        read.clear()
        assert (tmp_path / "checkpoint.pt").exists() is not finished
        assert train_on(data, tmp_path, "--lr", "0.05", "--epochs", "3") == 2
        assert "epochs is 2 there and 3 here; lr is 0.1 there and 0.05 here" in capsys.readouterr().err
        assert train_on(data / "dark", tmp_path) == 2
        assert f"data is imagefolder:{data} there and imagefolder:{data}/dark here" in capsys.readouterr().err
        assert contents(tmp_path) == before and read == []
        assert train_on(data, tmp_path) == 0
    assert train_on(data, tmp_path, "--lr", "0.05", "--no-resume") == 0
    assert json.loads((tmp_path / "result.json").read_text())["run"]["lr"] == 0.05


def test_other_images_of_the_same_name_are_refused(data, tmp_path, capsys, monkeypatch):
    data = shutil.copytree(data, tmp_path / "images")
    tmp_path = tmp_path / "out"
    with monkeypatch.context() as patch:
        die(patch, "write_result", 1, False)
        with pytest.raises(Killed):
            train_on(data, tmp_path)
    for file in data.glob("dark/*.png"):  # as another version of the same folder
        Image.new("RGB", (16, 16), (9, 9, 9)).save(file)
    assert train_on(data, tmp_path) == 2
    assert "training images is " in capsys.readouterr().err


LOADERS = ("resident", "torch", pytest.param("dali", marks=[pytest.mark.dali, NO_DALI]))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_loader_is_how_and_not_what(data, tmp_path, capsys, loader):
    """16x16 files need no resizing, so that all see the same pixels."""
    given = ["--augment", "shift", "--workers", "1"]
    assert train_on(data, tmp_path / "one", *given, "--loader", "resident") == 0
    assert train_on(data, tmp_path / "two", *given, "--loader", loader) == 0
    assert f"loader: {loader} (as asked" in capsys.readouterr().err
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    rounding = 1e-3 if loader == "dali" else 0  # of 6 steps, on images that differ by about 1e-7
    assert all((one[key] - two[key]).abs().max() <= rounding for key in one)


def test_one_run_at_a_time(data, tmp_path, capsys):
    with folder_lock(tmp_path):
        assert train_on(data, tmp_path) == 2
    assert "is in use" in capsys.readouterr().err


def test_a_result_of_unknown_settings_is_refused(data, tmp_path, capsys):
    (tmp_path / "result.json").write_text('{"accuracy": 1}')
    assert train_on(data, tmp_path) == 2
    assert "--no-resume" in capsys.readouterr().err


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
