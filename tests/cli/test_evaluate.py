"""dfkd-evaluate: a checkpoint on a labelled folder; what is printed, kept and refused."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

from dfkd.cli import evaluate as cli
from dfkd.teachers import Classifier
from tests.cli.small_generate import CLASS_NAMES, last_line, save_classifier, status_of
from tests.teachers import weight_files


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


def test_a_test_without_a_class_goes_by_the_names_of_training(small_teacher, folder, tmp_path, capsys):
    for split, names in (("train", CLASS_NAMES), ("val", CLASS_NAMES[1:])):
        for name in names:
            shutil.copytree(folder / name, tmp_path / split / name)
    torch.save(Classifier.from_pretrained(small_teacher).state_dict(), tmp_path / "t.pth")
    described = ("--teacher", "resnet8", "--teacher-mean", "none", "--teacher-std", "none", "--teacher-input-size", 16)
    for classifier in (("--checkpoint", small_teacher), ("--checkpoint", tmp_path / "t.pth", *described)):
        assert call(*classifier, "--data", f"imagefolder:{tmp_path}") == 0
        found = last_line(capsys.readouterr().out)
        assert found["source"] == f"10 images of 2 classes in {tmp_path / 'val'}"
        assert [name for name, share in found["per_class"].items() if share is None] == [CLASS_NAMES[0]]


def test_refusals_in_words(small_teacher, folder, tmp_path, capsys):
    other = save_classifier(tmp_path / "other", names=("a", "b", "c"))
    cases = [
        (("--data", folder), "give --checkpoint FOLDER, --clients FOLDER FOLDER, or --teacher"),
        (("--data", f"list:{small_teacher}/model.safetensors", "--checkpoint", small_teacher), "is no list of images"),
        (("--data", "mnist", "--checkpoint", small_teacher), "choose one of digits-on-photos"),
        (("--data", folder, "--checkpoint", other), "the classifier knows a, b, c"),
        (("--data", folder, "--checkpoint", small_teacher, "--teacher-checkpoint", other), "is --reference"),
        (("--data", folder, "--checkpoint", small_teacher, "--reference", other), "different classes"),
    ]
    for argv, words in cases:
        assert call(*argv) == 2
        assert words in capsys.readouterr().err


class TestWeightFiles:
    """Every form of a checkpoint through the command, on images that the network tells apart."""

    @pytest.fixture(scope="class")
    def shades(self, tmp_path_factory):
        root = tmp_path_factory.mktemp("shades")
        for name, level in {"bright": 230, "dark": 25, "grey": 128}.items():
            (root / name).mkdir()
            for index in range(4):
                Image.new("RGB", (12, 12), (level + index,) * 3).save(root / name / f"{index}.png")
        return root

    @pytest.mark.parametrize("form", [*weight_files.SAVED, *weight_files.WRITTEN])
    def test_the_same_accuracy_from_every_form(self, form, shades, tmp_path, capsys):
        write = weight_files.WRITTEN.get(form, lambda file: torch.save(weight_files.SAVED[form](), file))
        write(file := tmp_path / form)
        assert self.asked(file, shades, tmp_path) == 0
        printed = capsys.readouterr()
        assert "3 classes, fed 12 x 12 pixels, mean 0.5, 0.5, 0.5, std 0.25, 0.25, 0.25" in printed.err
        assert last_line(printed.out)["accuracy"] == 1.0

    @pytest.mark.parametrize("name", weight_files.REFUSED)
    def test_what_is_no_network_is_refused_in_one_line(self, name, shades, tmp_path, capsys):
        write, words = weight_files.REFUSED[name]
        write(tmp_path / name)
        assert self.asked(tmp_path / name, shades, tmp_path) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert re.search(words, line) and "weights_only" not in line

    def asked(self, file, shades, tmp_path):
        network = ("--teacher", weight_files.write_described(tmp_path), "--checkpoint", file)
        return call(*network, "--classes", "bright,dark,grey", "--data", f"imagefolder:{shades}", "--split", "all")


def test_classes_from_a_file_and_how_it_is_fed(tmp_path, folder, capsys):
    """Names with commas; and options that say otherwise than the network's own file."""
    names = ["zero, or nought", "one", "two"]
    for old, new in zip(sorted(CLASS_NAMES), sorted(names), strict=True):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / new).symlink_to(folder / old)
    (tmp_path / "names.txt").write_text("\n".join(sorted(names)))
    torch.save(weight_files.weights(), tmp_path / "t.pth")
    network = ("--teacher", weight_files.write_described(tmp_path), "--checkpoint", tmp_path / "t.pth")
    fed = ("--teacher-mean", "none", "--teacher-std", "none", "--teacher-input-size", 10)
    asked = ("--classes", f"@{tmp_path / 'names.txt'}", "--data", f"imagefolder:{tmp_path / 'images'}")
    assert call(*network, *fed, *asked, "--split", "all") == 0
    printed = capsys.readouterr()
    assert "fed 10 x 10 pixels, in 0..1" in printed.err
    assert list(last_line(printed.out)["per_class"]) == sorted(names)
