import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dfkd import teachers
from dfkd.cli import distill as cli
from dfkd.cli.options import command, parse
from dfkd.errors import UsageError
from dfkd.presets import PRESETS
from dfkd.teachers import checkpoint
from dfkd.teachers.classifier import Classifier
from tests.shard_folders import CLASS_NAMES, make

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and synthetic images."""
    folder = tmp_path_factory.mktemp("inputs")
    save_teacher(folder / "teacher", CLASS_NAMES)
    make(folder / "synthetic", count=24, size=32, shard_size=8)
    return folder


def save_teacher(path: Path, class_names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    network = teachers.build("resnet8", len(class_names))
    checkpoint.save(path, Classifier(network, "resnet8", class_names, 32, (0.5,) * 3, (0.25,) * 3))


def arguments(inputs: Path, out: Path, *more: str) -> list[str]:
    given = {"data": inputs / "synthetic", "teacher-checkpoint": inputs / "teacher", "out": out}
    paths = [text for key, path in given.items() for text in (f"--{key}", str(path))]
    small = ["--student", "resnet8", "--batch-size", "8", "--lr", "0.01", "--augment", "shift", "--device", "cpu"]
    length = [] if "--epochs" in more else ["--steps", "4"]
    return [*paths, *small, *length, *more]


def call(*argv: str) -> int:
    return command(cli.Options, cli.run, cli.COMMAND, argv)


def last_line(text: str) -> dict[str, object]:
    line: dict[str, object] = json.loads(text.splitlines()[-1])
    return line


def test_a_run_leaves_a_student_that_loads_and_a_result(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments(inputs, tmp_path)) == 0
    printed = capsys.readouterr()
    result = last_line(printed.out)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert (result["steps"], result["images"], result["accuracy"]) == (4, 32, None)
    assert 0 <= float(str(result["agreement"])) <= 1
    assert "loader: resident (" in printed.err and "kernels: torch (the device is cpu)" in printed.err
    assert result["kernels"] == {"name": "torch", "why": "the device is cpu"}
    for name in ("last", "best"):
        student = checkpoint.load(None, tmp_path / name)
        assert student.architecture == "resnet8" and student.class_names == CLASS_NAMES
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["options"]["lr"] == 0.01 and settings["options"]["temperature"] == 30


def test_a_finished_run_prints_its_result_again(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call(*arguments(inputs, tmp_path))
    first = last_line(capsys.readouterr().out)
    monkeypatch.setattr(cli, "distill", None)  # would fail if called
    assert call(*arguments(inputs, tmp_path)) == 0
    assert last_line(capsys.readouterr().out) == first


def test_other_settings_in_the_same_folder_are_refused_and_change_nothing(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(*arguments(inputs, tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert call(*arguments(inputs, tmp_path, "--temperature", "4")) == 2
    assert "temperature is 30.0 there and 4.0 here" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert call(*arguments(inputs, tmp_path, "--temperature", "4", "--no-resume")) == 0


def test_the_real_test_is_read_once_after_the_training(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfkd.evaluation import real_data

    read = []

    def load(name: str, split: str, size: int | None = None) -> real_data.LabelledImages:
        read.append((name, split))
        assert (tmp_path / "last" / "model.safetensors").exists()
        labels = torch.arange(30) % 3
        return real_data.LabelledImages(torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8), labels, CLASS_NAMES)

    monkeypatch.setattr(real_data, "load", load)
    given = arguments(inputs, tmp_path, "--test", "digits-on-photos", "--test-split", "validation")
    assert call(*given) == 0 and call(*given) == 0
    assert read == [("digits-on-photos", "validation")]
    result = json.loads((tmp_path / "result.json").read_text())
    confusion = torch.tensor(result["confusion"])
    assert confusion.sum(1).tolist() == [10, 10, 10] and result["test_images"] == 30
    assert result["accuracy"] == pytest.approx(float(confusion.diag().sum()) / 30)
    assert 0 <= result["best_accuracy"] <= 1


def test_nothing_that_reads_real_images_is_imported_without_a_test(inputs: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from dfkd.cli.distill import Options, run; from dfkd.cli.options import command;"
        "assert command(Options, run, 'dfkd-distill') == 0;"
        "assert not [name for name in sys.modules if name.startswith('dfkd.evaluation')]"
    )
    subprocess.run([sys.executable, "-c", code, *arguments(inputs, tmp_path)], cwd=ROOT, check=True)


def test_a_killed_command_goes_on_to_the_same_student(inputs: Path, tmp_path: Path) -> None:
    given = ["--steps", "24", "--checkpoint-every", "1"]
    call(*arguments(inputs, tmp_path / "whole", *given))
    code = "from dfkd.cli.distill import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments(inputs, killed, *given)], cwd=ROOT, env=environment
    )
    log = killed / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 8):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not (killed / "last").exists()
    assert call(*arguments(inputs, killed, *given)) == 0
    for name in ("last", "best"):
        weights = [(tmp_path / run / name / "model.safetensors").read_bytes() for run in ("whole", "killed")]
        assert weights[0] == weights[1]


def test_a_signal_leaves_a_checkpoint_and_its_status(inputs: Path, tmp_path: Path) -> None:
    given = ["--steps", "24", "--checkpoint-every", "100"]
    call(*arguments(inputs, tmp_path / "whole", *given))
    # The signal comes from within, in the fifth step: one from outside might come before the first or after the last.
    code = """
import os, signal
from dfkd.cli import distill as cli
own, calls = cli.distill, []
def distill(*given, watch, **named):
    def watched(done, total):
        calls.append(done)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        watch(done, total)
    return own(*given, watch=watched, **named)
cli.distill = distill
cli.main()
"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    stopped = tmp_path / "stopped"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments(inputs, stopped, *given)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (143, ""), done.stderr
    assert done.stderr.endswith("stopped after step 5 of 24; started again it goes on\n")
    assert call(*arguments(inputs, stopped, *given)) == 0
    weights = [(tmp_path / run / "last" / "model.safetensors").read_bytes() for run in ("whole", "stopped")]
    assert weights[0] == weights[1]


def test_wrong_input_is_refused_before_work(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_teacher(tmp_path / "other", ("zero", "one"))
    (tmp_path / "file").touch()
    out = tmp_path / "out"
    cases = [
        (["--teacher-checkpoint", str(tmp_path / "other")], "it has 2, the images have 3"),
        (["--epochs", "2", "--steps", "3"], "--steps 3 and --epochs 2 are both given"),
        (["--amp", "fp16"], "fp16 on a CPU"),
        (["--cuda-graph"], "CUDA graphs are for GPUs"),
        (["--cache-logits", "on"], "--cache-logits on: with --augment shift"),
        (["--student", "resnet9"], "resnet8"),
        (["--data", str(tmp_path)], "cannot read"),
        (["--teacher-checkpoint", str(tmp_path / "none")], "no checkpoint"),
        (["--test", "imagefolder:nowhere"], "there is no nowhere"),
        (["--out", str(tmp_path / "file" / "out")], "cannot write to"),
    ]
    for more, message in cases:
        assert call(*arguments(inputs, out, *more)) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ") and message in printed.err
        assert printed.out == ""
    assert not (out / "checkpoint.pt").exists()


def test_kernels_are_named_and_refused_before_anything_is_read(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="the kernel needs Triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        assert call(*arguments(inputs, tmp_path / "triton", "--kernels", "triton")) == 0
        printed = capsys.readouterr()
        assert "kernels: triton (as asked, in its interpreter" in printed.err
        assert last_line(printed.out)["kernels"]["name"] == "triton"  # type: ignore[index]
        assert json.loads((tmp_path / "triton" / "settings.json").read_text())["options"]["kernels"] == "triton"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cli, "open_folder", None)  # would fail if called
    assert call(*arguments(inputs, tmp_path / "out", "--kernels", "triton")) == 2
    assert capsys.readouterr().err.startswith("error: --kernels triton on cpu: Triton compiles for GPUs")
    assert call(*arguments(inputs, tmp_path / "out", "--kernels", "cuda")) == 2
    assert "one of auto, triton, torch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_damaged_shard_has_lost_is_named_and_may_be_left_out(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(inputs / "synthetic", tmp_path / "synthetic")
    shard = data / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:20_000])

    def given(out: str, *more: str) -> list[str]:
        return [*arguments(inputs, tmp_path / out), "--data", str(data), *more]

    assert call(*given("out")) == 2
    assert "shard-00001.tar: image 15 (absent" in capsys.readouterr().err
    results = []
    for loader in ("resident", "torch"):
        assert call(*given(loader, "--on-bad-sample", "skip", "--loader", loader, "--workers", "0")) == 0
        printed = capsys.readouterr()
        results.append(last_line(printed.out))
        assert f"left out: {len(results[-1]['left_out'])} of 24 images" in printed.err  # type: ignore[arg-type]
        assert "shard-00001.tar: image 15 (absent" in printed.err
    assert results[0]["left_out"] == results[1]["left_out"] and 15 in results[0]["left_out"]  # type: ignore[operator]
    weights = [(tmp_path / name / "last" / "model.safetensors").read_bytes() for name in ("resident", "torch")]
    assert weights[0] == weights[1]
    shutil.copy(inputs / "synthetic" / shard.name, shard)  # repaired: these are other images
    assert call(*given("torch", "--on-bad-sample", "skip", "--loader", "torch")) == 2
    assert "data is " in capsys.readouterr().err


def test_a_presets_length_can_be_taken_back() -> None:
    needed = ["--data", "d", "--student", "resnet8", "--out", "o"]
    with pytest.raises(UsageError, match="--epochs none"):
        parse(cli.Options, [*needed, "--preset", "cifar10", "--steps", "5"], cli.COMMAND, PRESETS)
    options = parse(
        cli.Options, [*needed, "--preset", "cifar10", "--steps", "5", "--epochs", "none"], cli.COMMAND, PRESETS
    )
    assert (options.steps, options.epochs) == (5, None)


def test_a_checkpoint_file_takes_its_classes_from_the_images(inputs: Path, tmp_path: Path) -> None:
    network = checkpoint.load(None, inputs / "teacher").module
    torch.save({"state_dict": network.state_dict()}, tmp_path / "teacher.pth")
    given = arguments(inputs, tmp_path / "out", "--teacher", "resnet8", "--normalisation", "domainnet")
    given[given.index("--teacher-checkpoint") + 1] = str(tmp_path / "teacher.pth")
    assert call(*given) == 0
    student = checkpoint.load(None, tmp_path / "out" / "last")
    assert student.mean == (0.5, 0.5, 0.5) and student.class_names == CLASS_NAMES
