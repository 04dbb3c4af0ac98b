"""The model card: made from what a run has on record, silent about what is not, and true about how to load it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from dfkd.model_card import NOT_STATED, card, licence_of, load_folder, load_hub, read_facts, write
from dfkd.teachers import Classifier, build

NAMES = ("zero", "one", "two")


def put(path: Path, **content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """RUN/student/last, and RUN as the commands leave it."""
    run = tmp_path / "run"
    torch.manual_seed(0)
    half = (0.5, 0.5, 0.5)
    Classifier(build("resnet8", 3).eval(), NAMES, half, half, 32, "resnet8").save_pretrained(run / "student/last")
    settings = {"method": "guided", "prompt": "a photo of a {label}", "steps": 20, "prior_digests": {"unet": "ab"}}
    prior = tmp_path / "priors/mine"
    prior.mkdir(parents=True)
    (prior / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n# Mine\n")
    put(run / "synthetic/manifest.json", settings=settings, count=400, run={"prior": str(prior)})
    told = {"teacher": "resnet20 0123456789abcdef", "lr": 0.2, "steps": 260, "data": "fedcba"}
    put(run / "student/result.json", run=told, agreement=0.9, best_agreement=0.95, accuracy=None)
    tests = {"student": {"accuracy": 0.8431, "teacher_accuracy": 0.96}, "baselines": {"unguided": {"accuracy": 0.115}}}
    put(run / "evaluation.json", data="imagefolder:/home/me/photos/{split}", split="test", images=1000, **tests)
    return run / "student/last"


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_a_students_card_says_what_it_was_made_from_and_how_good_it_is(student: Path) -> None:
    text = card(read_facts(student), load_folder(str(student), "resnet8"))
    for words in (
        "| teacher | resnet20 0123456789abcdef |",
        "| prior | priors/mine; licence: creativeml-openrail-m |",
        "| images | count 400, method guided, prompt a photo of a {label}, steps 20 |",
        "| training | steps 260, lr 0.2 |",
        "| | accuracy on 1000 images of imagefolder:photos/{split} (test) |",
        "| this network | 84.3 % |",
        "| its teacher | 96.0 % |",
        "| control: the same student on images of `unguided` | 11.5 % |",
        "on 90.0 % of synthetic images",
    ):
        assert words in text
    assert "/home" not in text and str(student.parents[2]) not in text.replace(str(student), "")
    top = front(text)
    assert top["library_name"] == "dfkd" and top["license"] == "unknown" and top["metrics"] == ["accuracy"]
    assert "datasets" not in top and "knowledge-distillation" in top["tags"]
    assert top["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.8431}]


def test_the_best_student_was_not_tested_by_the_run(student: Path) -> None:
    best = student.parent / "best"
    best.mkdir()
    (best / "config.json").write_bytes((student / "config.json").read_bytes())
    facts = read_facts(best)
    assert facts.tests == {} and facts.agreement == 0.95
    text = card(facts, "")
    assert "Not measured on real images." in text and "model-index" not in front(text)


def test_a_teachers_card_names_its_data(tmp_path: Path) -> None:
    put(tmp_path / "config.json", architecture="resnet8", class_names=["a|b", "c"], input_size=8, mean=[0.5], std=[0.5])
    told = {"data": "imagefolder:/data/me/pets", "epochs": 20}
    put(tmp_path / "result.json", run=told, accuracy=0.963, test_images=1000)
    text = card(read_facts(tmp_path), "")
    assert "| classes | a\\|b, c |" in text and "| training | data imagefolder:me/pets, epochs 20 |" in text
    assert "| | accuracy on 1000 images of the test split of imagefolder:me/pets |" in text and "teacher" not in text


def test_what_is_not_on_record_is_not_stated(tmp_path: Path) -> None:
    facts = read_facts(tmp_path, {"architecture": "", "class_names": [str(i) for i in range(100)], "input_size": 8})
    text = card(facts, load_hub("me/net", ""))
    assert f"| training | {NOT_STATED} |" in text and "18, 19, ... (100) |" in text
    assert "snapshot_download('me/net'), architecture=\"file:YOUR.py:FUNCTION\")" in text


@pytest.mark.parametrize(
    ("name", "content", "licence"),
    [
        ("README.md", "---\nlicense: mit\n---\n", "mit"),
        ("README.md", "no top\n", NOT_STATED),
        ("README.md", "---\nlicense: [\n---\n", NOT_STATED),
        ("LICENSE", "\n# CreativeML Open RAIL-M\ntext", "CreativeML Open RAIL-M"),
        ("other", "", NOT_STATED),
    ],
)
def test_a_priors_licence_is_what_its_folder_says(tmp_path: Path, name: str, content: str, licence: str) -> None:
    (tmp_path / name).write_text(content)
    assert licence_of(str(tmp_path)) == licence


def test_licences_of_priors_that_are_no_folders() -> None:
    assert licence_of("demo") == "apache-2.0" and licence_of("nobody/has-fetched-this") == NOT_STATED


def test_its_lines_load_the_network(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text = card(read_facts(student), load_folder(str(student), "resnet8"))
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in block.splitlines() if line]) == 5
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("photo.png")
    exec(block, {})
    wanted = Classifier.from_pretrained(student)(Image.open("photo.png")).argmax()
    assert capsys.readouterr().out.strip() == NAMES[int(wanted)]


def test_a_card_of_the_users_own_stays(tmp_path: Path, student: Path) -> None:
    file, text = tmp_path / "README.md", card(read_facts(student), "")
    assert write(file, text) == file and write(file, text + "more") == file and file.read_text().endswith("more")
    file.write_text("mine")
    assert write(file, text) is None and file.read_text() == "mine"
