"""dfkd-distill on a few small images: what it prints, leaves, tests and refuses."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dfkd import evaluation
from dfkd.cli import distill as cli
from dfkd.cli.progress import progress
from dfkd.data import Images
from dfkd.files import folder_lock
from dfkd.teachers import Classifier
from tests.cli.small_generate import last_line, save_classifier, status_of
from tests.shard_folders import CLASS_NAMES, class_folders, make
from tests.training.small_run import equal, result, signals


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, shards of synthetic images, and class folders of real ones."""
    folder = tmp_path_factory.mktemp("inputs")
    save_classifier(folder / "teacher", names=CLASS_NAMES)
    make(folder / "synthetic", count=24, size=16, shard_size=8)
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(CLASS_NAMES):
        (folder / "real" / name).mkdir(parents=True)
        for index in range(10):
            pixels = torch.randint(0, 100, (16, 16, 3), generator=generator) + 70 * label
            Image.fromarray(pixels.byte().numpy()).save(folder / "real" / name / f"{index}.png")
    return folder


def arguments(inputs: Path, out: Path, *more: object) -> list[object]:
    given = ["--data", inputs / "synthetic", "--teacher-checkpoint", inputs / "teacher", "--out", out]
    return [*given, "--student", "resnet8", "--batch-size", 8, "--lr", 0.01, "--device", "cpu", "--steps", 4, *more]


def call(*argv: object) -> int:
    return status_of(cli.main, *argv)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_leaves_a_student_that_loads_and_a_result(inputs: Path, tmp_path: Path, capsys: Any) -> None:
    assert call(*arguments(inputs, tmp_path)) == 0
    printed = capsys.readouterr()
    found = last_line(printed.out)
    assert found == result(tmp_path)
    assert (found["steps"], found["images"], found["accuracy"], found["left_out"]) == (4, 32, None, [])
    assert 0 <= found["agreement"] <= found["best_agreement"] <= 1
    assert "loader: resident (" in printed.err and "kernels: torch (the device is cpu)" in printed.err
    assert found["kernels"] == {"name": "torch", "why": "the device is cpu"}
    for name in ("last", "best"):
        student = Classifier.from_pretrained(tmp_path / name)
        assert student.architecture == "resnet8" and student.class_names == CLASS_NAMES
    options = json.loads((tmp_path / "settings.json").read_text())["options"]
    assert options["lr"] == 0.01 and options["temperature"] == 30
    before = files(tmp_path)
    assert call("--config", tmp_path / "settings.json") == 0  # finished: its result again
    assert last_line(capsys.readouterr().out) == found and files(tmp_path) == before
    assert call(*arguments(inputs, tmp_path), "--temperature", 4) == 2
    assert "temperature is 30.0 there and 4.0 here" in capsys.readouterr().err and files(tmp_path) == before


def test_a_signal_leaves_a_checkpoint_and_its_status(
    inputs: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(*arguments(inputs, tmp_path / "whole")) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("dfkd.cli.distill.progress", lambda *given, **named: _Fixed(signals(signal.SIGTERM, 1)))
        assert call(*arguments(inputs, tmp_path / "stopped")) == 143
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.endswith("stopped after step 2 of 4; started again it goes on\n")
    assert (tmp_path / "stopped" / "settings.json").exists()
    assert call(*arguments(inputs, tmp_path / "stopped")) == 0
    assert equal(tmp_path / "whole/last", tmp_path / "stopped/last")


class _Fixed:
    """A context that gives one object."""

    def __init__(self, given: object) -> None:
        self._given = given

    def __enter__(self) -> object:
        return self._given

    def __exit__(self, *error: object) -> None:
        pass


def test_the_real_test_is_read_once_after_the_training(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def evaluate(classifier: Classifier, data: Images) -> evaluation.Evaluation:
        read.append(evaluation.described(data))
        assert (tmp_path / "last" / "model.safetensors").exists()
        return own(classifier, data)

    own = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    real = f"imagefolder:{inputs / 'real'}"
    given = arguments(inputs, tmp_path, "--test", real)
    assert call(*given) == 0 and call(*given) == 0
    assert read == [f"30 images of 3 classes in {inputs / 'real'}"] * 2  # the last student and the best one
    found = result(tmp_path)
    confusion = torch.tensor(found["confusion"])
    assert confusion.sum(1).tolist() == [10, 10, 10] and found["test_images"] == 30
    assert found["accuracy"] == pytest.approx(float(confusion.diag().sum()) / 30) and 0 <= found["best_accuracy"] <= 1
    assert call(*given, "--test-split", "validation") == 0  # another test of the same student
    assert result(tmp_path)["test_images"] == 3 and len(read) == 4


def test_wrong_input_is_refused_before_work(inputs: Path, tmp_path: Path, capsys: Any) -> None:
    save_classifier(tmp_path / "other", names=("zero", "one"))
    (tmp_path / "file").touch()
    out = tmp_path / "out"
    cases: list[tuple[list[object], str]] = [
        (["--teacher-checkpoint", tmp_path / "other"], "two"),
        (["--amp", "fp16"], "fp16 on a CPU"),
        (["--cuda-graph"], "CUDA graphs are for GPUs"),
        (["--kernels", "cuda"], "one of auto, triton, torch"),
        (["--student", "resnet9"], "resnet8"),
        (["--data", tmp_path / "none"], "none"),
        (["--teacher-checkpoint", tmp_path / "none"], "no checkpoint"),
        (["--test", "imagefolder:nowhere"], "there is no nowhere"),
        (["--test", "digit-on-photos"], "there is no such data"),
        (["--test", f"imagefolder:{tmp_path}/{{split}}"], "there is no"),
        (["--test", class_folders(tmp_path / "ants", ("one", "ant"))], "the images have the classes ant"),
        (["--loss", "nowhere.py:Hint"], "no file nowhere.py"),
        (["--plateau", "9"], "--plateau 9 cannot act"),
        (["--init", tmp_path / "none"], "none"),
        (["--init", tmp_path / "other"], "classes"),
        (["--init", save_classifier(tmp_path / "wrn", architecture="wrn16_1")], "is wrn16_1, the student resnet8"),
        (["--out", tmp_path / "file" / "out"], "cannot write to"),
    ]
    for more, message in cases:
        given = arguments(inputs, out)
        if more[0] in given:
            given[given.index(more[0]) + 1] = more[1]
        else:
            given += more
        assert call(*given) == 2
        printed = capsys.readouterr()
        assert "error: " in printed.err and message in printed.err and printed.out == ""
    assert not (out / "checkpoint.pt").exists()


def test_a_student_that_exists_is_trained_further(inputs: Path, tmp_path: Path) -> None:
    start = save_classifier(tmp_path / "start", seed=5, names=CLASS_NAMES)
    for name, more in (("warm", ("--init", start)), ("cold", ())):
        assert call(*arguments(inputs, tmp_path / name), *more) == 0
    assert not equal(tmp_path / "warm/last", tmp_path / "cold/last")
    assert call(*arguments(inputs, tmp_path / "warm"), "--init", start) == 0
    save_classifier(start, seed=6, names=CLASS_NAMES)  # other weights of the same name: another run
    assert call(*arguments(inputs, tmp_path / "warm"), "--init", start) == 2


def test_a_folder_in_use_keeps_the_settings_of_its_run(inputs: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "settings.json").write_text("of the run that holds the folder")
    with folder_lock(tmp_path):
        assert call(*arguments(inputs, tmp_path)) == 2
    assert "is in use" in capsys.readouterr().err
    assert (tmp_path / "settings.json").read_text() == "of the run that holds the folder"


def test_several_folders_and_class_folders_are_data_and_are_never_touched(
    inputs: Path, tmp_path: Path, capsys: Any
) -> None:
    before = files(inputs)
    both = f"{inputs / 'synthetic'},{inputs / 'real'}"
    for name, data in (("one", inputs / "synthetic"), ("both", both), ("real", inputs / "real")):
        given = arguments(inputs, tmp_path / name, "--steps", 2)
        given[given.index("--data") + 1] = data
        assert call(*given) == 0, capsys.readouterr().err
    assert not equal(tmp_path / "one/last", tmp_path / "both/last")
    assert files(inputs) == before


def test_what_a_damaged_shard_has_lost_is_named_and_may_be_left_out(inputs: Path, tmp_path: Path, capsys: Any) -> None:
    data = shutil.copytree(inputs / "synthetic", tmp_path / "synthetic")
    shard = data / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:12_000])
    given = arguments(inputs, tmp_path / "out")
    given[given.index("--data") + 1] = data
    assert call(*given) == 2
    assert "image 15" in capsys.readouterr().err
    assert call(*given, "--on-bad-sample", "skip") == 0
    printed = capsys.readouterr()
    left_out = last_line(printed.out)["left_out"]
    assert 15 in left_out and f"left out: {len(left_out)} of 24 images" in printed.err
    shutil.copy(inputs / "synthetic" / shard.name, shard)  # repaired: these are other images
    assert call(*given, "--on-bad-sample", "skip") == 2
    assert "data is " in capsys.readouterr().err


def test_a_checkpoint_file_takes_its_classes_from_the_images(inputs: Path, tmp_path: Path) -> None:
    state = Classifier.from_pretrained(inputs / "teacher").state_dict()
    torch.save({"state_dict": state}, tmp_path / "teacher.pth")
    given = arguments(inputs, tmp_path / "out", "--teacher", "resnet8", "--normalisation", "domainnet")
    given[given.index("--teacher-checkpoint") + 1] = tmp_path / "teacher.pth"
    assert call(*given) == 0
    student = Classifier.from_pretrained(tmp_path / "out" / "last")
    assert student.mean == (0.5, 0.5, 0.5) and student.class_names == CLASS_NAMES


def test_the_bar_takes_what_the_loop_tells() -> None:
    with progress("distilling", "img", shown=False) as draw:
        draw(8, 32)
        draw(32, 32)
