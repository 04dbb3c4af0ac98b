"""dfkd-evaluate: a checkpoint on a labelled folder; what is printed, kept and refused."""

import json

import pytest
import torch
from PIL import Image

from dfkd.cli import evaluate as cli
from dfkd.teachers import Classifier
from tests.cli.small_generate import CLASS_NAMES, last_line, save_classifier, status_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of 5 flat grey images."""
    root = tmp_path_factory.mktemp("images")
    for label, name in enumerate(CLASS_NAMES):
        (root / name).mkdir()
        for index in range(5):
            Image.new("RGB", (20, 16), (50 * label + 10 * index,) * 3).save(root / name / f"{index}.png")
    return root


def call(*argv: object) -> int:
    return status_of(cli.main, "--device", "cpu", *argv)


def test_a_student_beside_its_teacher(small_teacher, folder, tmp_path, capsys):
    out = tmp_path / "deep" / "result.json"
    asked = ("--checkpoint", small_teacher, "--reference", small_teacher, "--data", folder, "--split", "all")
    assert call(*asked, "--out", out) == 0
    printed = capsys.readouterr()
    found = last_line(printed.out)
    assert "testing resnet8, 3 classes, fed 16 x 16 pixels" in printed.err
    assert list(found)[-1] == "accuracy" and json.loads(out.read_text()) == found
    assert (found["images"], found["agreement"], found["split"]) == (15, 1.0, "all")
    assert found["accuracy"] == found["teacher_accuracy"] == sum(found["confusion"][i][i] for i in range(3)) / 15
    assert list(found["per_class"]) == list(CLASS_NAMES)


def test_a_bare_file_is_described_by_options_and_named_by_the_images(small_teacher, folder, tmp_path, capsys):
    whole = Classifier.from_pretrained(small_teacher)
    torch.save(whole.state_dict(), tmp_path / "t.pth")
    described = ("--teacher", "resnet8", "--teacher-mean", *whole.mean, "--teacher-std", "0.25,0.25,0.25")
    data = ("--data", f"imagefolder:{folder}", "--split", "all", "--limit", 6)
    assert call("--checkpoint", tmp_path / "t.pth", *described, "--teacher-input-size", 16, *data) == 0
    named = last_line(capsys.readouterr().out)
    assert named["images"] == 6
    by_name = ("--classes", ",".join(sorted(CLASS_NAMES)))  # the folder's order, given by hand
    assert call("--checkpoint", tmp_path / "t.pth", *described, *by_name, "--teacher-input-size", 16, *data) == 0
    assert last_line(capsys.readouterr().out) == named


def test_refusals_in_words(small_teacher, folder, tmp_path, capsys):
    other = save_classifier(tmp_path / "other", names=("a", "b", "c"))
    cases = [
        (("--data", folder), "give --checkpoint FOLDER, or --teacher"),
        (("--data", f"list:{small_teacher}/model.safetensors", "--checkpoint", small_teacher), "is no list of images"),
        (("--data", "mnist", "--checkpoint", small_teacher), "choose one of digits-on-photos"),
        (("--data", folder, "--checkpoint", other), "the classifier knows a, b, c"),
        (("--data", folder, "--checkpoint", small_teacher, "--teacher-checkpoint", other), "is --reference"),
        (("--data", folder, "--checkpoint", small_teacher, "--reference", other), "different classes"),
    ]
    for argv, words in cases:
        assert call(*argv) == 2
        assert words in capsys.readouterr().err
