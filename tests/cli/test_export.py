"""Students on their way out: ONNX files that ONNX Runtime runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dfkd import onnx_file
from dfkd.cli import export as cli
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
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_differs_from_torch_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    save(tmp_path, "resnet8")
    (tmp_path / "model.onnx").write_bytes(b"before")
    other = save(tmp_path / "other", "resnet8")
    with torch.no_grad():
        other.module.fc.bias.add_(1)
    content = onnx_file.onnx_model(other, "float32", 18)
    monkeypatch.setattr(onnx_file, "onnx_model", lambda *given: content)
    assert call("--checkpoint", tmp_path) == 2
    assert "differs from torch by" in capsys.readouterr().err
    assert (tmp_path / "model.onnx").read_bytes() == b"before"


def test_refusals_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["--checkpoint", tmp_path / "none"], "no folder"),
        (["--checkpoint", tmp_path], "cannot read"),
        (["--checkpoint", tmp_path, "--opset", 12], "at least 18"),
        (["--checkpoint", tmp_path, "--images", "jpeg"], "float32, uint8"),
    ]
    for argv, words in cases:
        assert call(*argv) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr(onnx_file, "missing", lambda *modules: ["onnxscript"])
    assert call("--checkpoint", tmp_path) == 2
    assert "onnxscript absent. pip install 'dfkd[onnx]'" in capsys.readouterr().err
