"""Students on their way out: files that ONNX Runtime and torch run by themselves, each with its model card."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd.cli import export as cli
from dfkd.errors import UsageError
from dfkd.export import onnx_file
from dfkd.export.deployed import verify
from dfkd.teachers import Classifier, build
from tests.cli.small_generate import last_line, status_of

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("zero", "one", "two")


def save(folder: Path, name: str) -> Classifier:
    torch.manual_seed(0)
    network = build(name, len(NAMES))
    with torch.no_grad():  # statistics as after some training
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_mean.normal_(std=0.1)
                layer.running_var.uniform_(0.5, 2)
    student = Classifier(network.eval(), NAMES, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), 32, name)
    student.save_pretrained(folder)
    return student


def call(*argv: object) -> int:
    return status_of(cli.main, *argv)


@pytest.mark.parametrize(
    ("name", "dtype", "opset"),
    [
        ("resnet8", "float32", 18),
        ("vgg8", "uint8", 20),
        pytest.param("wrn16_1", "uint8", 18, marks=pytest.mark.slow),
        pytest.param("mobilenetv2", "uint8", 18, marks=pytest.mark.slow),
        pytest.param("shufflenetv2", "float32", 18, marks=pytest.mark.slow),
    ],
)
def test_a_student_as_onnx(
    tmp_path: Path, name: str, dtype: str, opset: int, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    student = save(tmp_path, name)
    file = tmp_path / "deep" / "model.onnx"
    assert call("--checkpoint", tmp_path, "--out", file, "--images", dtype, "--opset", opset) == 0
    printed = capsys.readouterr()
    result = last_line(printed.out)
    assert result["out"] == str(file) and result["bytes"] == file.stat().st_size and result["error"] < 1e-5
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (given,), (taken,) = session.get_inputs(), session.get_outputs()
    side = student.input_size
    assert (given.name, given.shape, given.type) == (
        "images", ["batch", 3, side, side], "tensor(float)" if dtype == "float32" else "tensor(uint8)"
    )  # fmt: skip
    assert (taken.name, taken.shape) == ("logits", ["batch", 3])
    known = session.get_modelmeta().custom_metadata_map
    assert json.loads(known["class_names"]) == list(NAMES) and known["architecture"] == name
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, side, side), dtype=np.uint8)
    images = pixels if dtype == "uint8" else pixels.astype(np.float32) / 255
    (found,) = session.run(None, {"images": images})
    with torch.no_grad():
        wanted = student.logits(torch.from_numpy(pixels).float() / 255)
    # float32 in another order of sums
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert str(ROOT).encode() not in file.read_bytes() and b"site-packages" not in file.read_bytes()
    import onnx

    model = onnx.load(file)
    onnx.checker.check_model(model)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [opset]
    assert {path.name for path in file.parent.iterdir()} == {file.name, f"{file.name}.settings.json", "MODEL.md"}
    assert result["card"] == str(file.parent / "MODEL.md")


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_a_student_as_a_program_of_torch(tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    student, file = save(tmp_path, "resnet8"), tmp_path / "model.pt2"
    assert call("--checkpoint", tmp_path, "--format", "torch-export", "--images", dtype) == 0
    result = last_line(capsys.readouterr().out)
    assert (result["out"], result["bytes"], result["opset"]) == (str(file), file.stat().st_size, None)
    assert result["error"] < 1e-5
    extra = {"dfkd.json": ""}
    program = torch.export.load(file, extra_files=extra).module()
    facts = json.loads(extra["dfkd.json"])
    assert json.loads(facts["class_names"]) == list(NAMES) and facts["input_size"] == "32"
    for rows in (1, 7):
        pixels = torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8)
        with torch.no_grad():
            wanted = student.logits(pixels.float() / 255)
            found = program(pixels if dtype == "uint8" else pixels.float() / 255)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert str(ROOT).encode() not in file.read_bytes() and b"site-packages" not in file.read_bytes()


def test_the_card_tells_how_every_file_beside_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its lines are run, without dfkd."""
    pytest.importorskip("onnxruntime")
    student, out = save(tmp_path / "student", "resnet8"), tmp_path / "out"
    program = ["model.pt2", "--format", "torch-export"]
    for argv in (["model.onnx"], program, [*program, "--images", "uint8"]):  # the last takes the place of its like
        assert call("--checkpoint", tmp_path / "student", "--out", out / argv[0], *argv[1:]) == 0
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out / "photo.png")
    wanted = NAMES[int(student(Image.open(out / "photo.png")).argmax())]
    blocks = re.findall(r"```python\n(.*?)```", (out / "MODEL.md").read_text(), re.DOTALL)
    assert ["model.pt2" in block for block in blocks] == [True, False] and "import dfkd" not in "".join(blocks)
    monkeypatch.chdir(out)
    for block in blocks:
        capsys.readouterr()
        exec(block, {})
        assert capsys.readouterr().out.strip() == wanted


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (lambda right: right + math.nan, "differs from torch by nan"),
        (lambda right: torch.where(right == right.max(), math.inf, right), "differs from torch by inf"),
        (lambda right: right * 1.001, "differs from torch by 1.0e-03"),
        (lambda right: right[:, :2], r"of 1 images it answers \(1, 2\), torch \(1, 3\)"),
        (lambda right: right[:1], r"of 5 images it answers \(1, 3\), torch \(5, 3\)"),
        (lambda right: right.missing, "does not run: AttributeError"),
    ],
    ids=["nan", "inf", "far", "classes", "rows", "fails"],
)
def test_a_file_that_answers_otherwise_is_refused(
    tmp_path: Path, found: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    student = save(tmp_path, "resnet8")
    assert verify(student.logits, student, "float32", "the file") < 1e-5
    with pytest.raises(UsageError, match=words):
        verify(lambda images: found(student.logits(images)), student, "float32", "the file")


def test_what_differs_from_torch_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    save(tmp_path, "resnet8")
    (tmp_path / "model.onnx").write_bytes(b"before")
    other = save(tmp_path / "other", "resnet8")
    with torch.no_grad():
        other.module.fc.bias.add_(1)
    content = onnx_file.write(other, "float32", 18)
    monkeypatch.setattr(onnx_file, "write", lambda *given: content)
    assert call("--checkpoint", tmp_path) == 2
    assert "differs from torch by" in capsys.readouterr().err
    assert (tmp_path / "model.onnx").read_bytes() == b"before"


def test_refusals_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["--checkpoint", tmp_path / "none"], "no folder"),
        (["--checkpoint", tmp_path], "config.json"),
        (["--checkpoint", tmp_path, "--opset", 12], "at least 18"),
        (["--checkpoint", tmp_path, "--images", "jpeg"], "float32, uint8"),
        (["--checkpoint", tmp_path, "--format", "pt"], "onnx, torch-export"),
        (
            ["--checkpoint", tmp_path, "--format", "torch-export", "--opset", 20],
            "--opset 20 with --format torch-export",
        ),
    ]
    for argv, words in cases:
        assert call(*argv) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr(onnx_file, "missing", lambda *modules: ["onnxscript"])
    assert call("--checkpoint", tmp_path) == 2
    assert "onnxscript absent. pip install 'dfkd[onnx]'" in capsys.readouterr().err
