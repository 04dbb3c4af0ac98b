"""dfkd-report --compare: runs and records of a benchmark on one page."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from dfkd.evaluation import figures
from dfkd.evaluation.paired import difference
from tests.cli.test_report import Balanced, call
from tests.evaluation.fake_run import CLASS_NAMES, WEAK, write_images, write_json, write_run, write_student

GUIDED, OTHER = (0.61, 0.65, 0.60), (0.60, 0.62, 0.61)
CEILING = (0.70, 0.71, 0.72)


def of_budgets(accuracy: tuple[float, ...], images: int) -> dict[str, Any]:
    """What a record has of a method; at the second budget a tenth better, on twice the images."""
    budgets = {"30": (accuracy, images), "120": (tuple(value + 0.1 for value in accuracy), 2 * images)}
    return {
        "accuracy": {budget: right for budget, (right, _) in budgets.items()},
        "images": {budget: [count] * len(accuracy) for budget, (_, count) in budgets.items()},
        "seconds": {budget: [float(budget) - 1] * len(accuracy) for budget in budgets},
    }


RECORD = {
    "budgets": [30, 120],
    "methods": {
        "unguided_pixels": of_budgets(OTHER, 100),
        "guided": of_budgets(GUIDED, 150),
        "real_data": of_budgets(CEILING, 150),
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, the record of a benchmark, and real images of their classes."""
    root = tmp_path_factory.mktemp("world")
    write_run(root / "one")
    write_run(root / "two", {"noise": (0.9, WEAK["noise"][1])}, seed=1)
    write_json(root / "quality.json", RECORD)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        place = root / "real" / CLASS_NAMES[number % 3] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
    return root


def compared(out: Path, *argv: object) -> tuple[dict[str, Any], str]:
    """report.json and the text of the page, which has to be well formed and alone."""
    assert call("--compare", *argv, "--out", out) == 0
    html = (out / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"https?://|<script|<link|@import|url\(", html)
    page = Balanced()
    page.feed(html)
    assert page.open == []
    return json.loads((out / "report.json").read_text()), " ".join(page.text.split())


def test_two_runs_and_their_baselines_are_put_side_by_side(world: Path, tmp_path: Path) -> None:
    data = ("--data", f"imagefolder:{world / 'real'}", "--features", world / "two" / "teacher")
    found, text = compared(tmp_path / "out", world / "one", world / "two", *data)
    assert list(found["students"]) == ["one", "one / noise", "one / unguided", "two", "two / noise"]
    assert (found["reference"], found["judged"], found["test_images"]) == ("one", 6, 30)
    budget, gap, pairs = found["students"]["one / noise"]["behind"][0]
    wanted = difference(np.arange(30) < 6, np.arange(30) < 23)  # of one seed each, by the images that each has right
    assert (budget, pairs) == (None, 1)
    assert gap == {"value": pytest.approx(wanted.value), "low": pytest.approx(wanted.low), "high": wanted.high}
    assert found["students"]["two / noise"]["behind"][0][1]["value"] == pytest.approx(0.9 - 23 / 30)  # of another seed
    assert "−56.7 (" in text and "76.7 %" in text
    assert "Without deepinversion and unguided-pixels beside it nothing can be put down" in text
    seen = {name: sets[0] for name, sets in found["images"].items()}
    assert {one["judged"] for one in seen.values()} == {6} and seen["two"]["seed"] == 1
    (network, teacher) = found["networks"]
    assert (network, teacher) == (str(world / "two" / "teacher"), "the teacher")
    same = seen["one"]["fidelity"]
    assert same[network] == same[teacher]  # both are written alike
    assert same[network]["frechet"] > 0 and 0 <= same[network]["recall"] <= 1
    assert found["real"][network]["diversity"] > 0
    assert len(found["ranks"]) == 3 + 2 * 4 and {one["methods"] for one in found["ranks"]} == {5}
    pictures = {path.name: Image.open(path).size for path in (tmp_path / "out").glob("contact_sheet_*.png")}
    assert len(pictures) == 5 and len(set(pictures.values())) == 1  # as many images of as many classes
    assert "The first 2 of each class" in text and "one & <only>" in text


def test_runs_of_one_name_are_its_seeds(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "png", lambda figure: b"")  # drawing takes long, and is tried above
    found, text = compared(tmp_path, f"mine={world / 'one'}", f"mine={world / 'two'}", "--judged", 0)
    assert [point["seed"] for point in found["students"]["mine"]["points"]] == [0, 1]
    behind = found["students"]["mine / noise"]["behind"][0]
    wanted = stats.ttest_rel((0.2, 0.9), (23 / 30, 23 / 30)).confidence_interval()
    assert behind[1] == {"value": pytest.approx(0.55 - 23 / 30), "low": pytest.approx(wanted.low),
                         "high": pytest.approx(wanted.high)}  # fmt: skip
    assert behind[2] == 2 and found["images"] == {} and "not shown" in text


def test_a_record_is_compared_at_every_budget(world: Path, tmp_path: Path) -> None:
    found, text = compared(tmp_path / "out", world / "quality.json")
    assert found["reference"] == "guided"
    wanted = stats.ttest_rel(OTHER, GUIDED).confidence_interval()
    for budget, gap, seeds in found["students"]["unguided_pixels"]["behind"]:
        assert (budget in (30, 120), seeds) == (True, 3)
        assert (gap["low"], gap["high"]) == pytest.approx((wanted.low, wanted.high))
    assert found["students"]["guided"]["accuracy"] == pytest.approx(0.72)  # at the largest budget
    assert found["students"]["guided"]["points"][3] == {
        "seed": 0, "accuracy": pytest.approx(0.71), "seconds": 119.0, "images": 300, "budget": 120.0
    }  # fmt: skip
    assert "30 s" in text and "+1.0 (" in text and "real images of the teacher's world" in text
    assert "Without deepinversion beside it" in text
    # the ceiling is no rival
    assert [answer["short"] for answer in found["answers"]] == ["not shown"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    charts = {"accuracy_seconds.png", "accuracy_images.png", "behind.png"}
    assert names == {"report.html", "report.json", "report.settings.json", *charts}


def test_a_record_takes_images_from_folders_of_its_methods(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "png", lambda figure: b"")
    untested = tmp_path / "untested"
    write_images(untested / "synthetic", count=9, seed=3)
    argv = (world / "quality.json", f"guided={untested}", "--teacher", world / "one" / "teacher")
    found, text = compared(tmp_path / "out", *argv, "--judged", 8)
    assert list(found["students"]) == list(RECORD["methods"])
    assert len(found["students"]["guided"]["points"]) == 6
    (seen,) = found["images"]["guided"]
    assert (seen["seed"], seen["images"], seen["judged"], seen["accuracy"]) == (3, 9, 8, None)
    assert seen["view"]["gap"] > 0 and seen["fidelity"] == {}
    note = "Not compared with real images. No test of these runs names any. give --data."
    assert found["notes"] == [note] and note in text


def of_size(root: Path, size: int) -> None:
    write_images(root / "synthetic", size=size)
    write_student(root / "student", 0.5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("absent", "one"), "--compare absent: there is no such folder or file"),
        (("empty",), "--compare empty: it holds no synthetic/manifest.json"),
        (("alone",), "nothing to compare: there is only alone"),
        (("one", "untested"), "untested has no test on real images: methods are compared by the accuracy"),
        (("one", "larger"), "have images of different sizes: 8 and 9 pixels"),
        (
            ("one", "elsewhere"),
            "tested on different images: one on 30 test images of digits-on-photos, elsewhere on 30",
        ),
        (("one", "copy/one"), "two runs are called 'one'"),
        (("a=one", "a=one"), "two have seed 0"),
        (("quality.json", "quality.json"), "two records have 'unguided_pixels'"),
        (("odd.json",), "accuracy, seconds and images of guided at 30 s are not one each a seed"),
        (("wrong.json",), "does not say 'methods'"),
        (("when.json",), "budgets are seconds"),
        (("percent.json",), "an accuracy of guided at 30 s is not in 0..1"),
        (("one", "two", "--run", "one"), "--run is of one run"),
        (("quality.json", "--data", "digits-on-photos"), "--data does not act: records alone have no images"),
        (("one", "two", "--judged", "0", "--features", "one/teacher"), "--features does not act: no image is judged"),
        (("one", "two", "--data", "imagefolder:real", "--judged", "500"), "real images, and 6 of each set are judged"),
        (("one", "two", "--features", "absent"), "no checkpoint absent"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    argv: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("one"))
    write_run(Path("two"), seed=1)
    for name in ("alone", "elsewhere", "copy/one"):
        write_images(Path(name) / "synthetic")
        write_student(Path(name) / "student", 0.5)
    result = json.loads(Path("elsewhere/student/result.json").read_text())
    write_json(Path("elsewhere/student/result.json"), {**result, "test": "imagefolder:other"})
    write_images(Path("untested/synthetic"))
    of_size(Path("larger"), 9)
    Path("empty").mkdir()
    Image.new("RGB", (8, 8)).save((Path("real/zero").mkdir(parents=True), Path("real/zero/0.png"))[1])
    write_json(Path("quality.json"), RECORD)
    odd = {"budgets": [30], "methods": {"guided": {"accuracy": {"30": [0.5, 0.6]}, "images": {"30": [1]}}}}
    write_json(Path("odd.json"), odd)
    write_json(Path("wrong.json"), {"budgets": [30]})
    percent = {"guided": {"accuracy": {"30": [61.0]}, "images": {"30": [1]}, "seconds": {"30": [1]}}}
    write_json(Path("percent.json"), {"budgets": [30], "methods": percent})
    write_json(Path("when.json"), {"budgets": [], "methods": {"guided": {"accuracy": {"soon": [0.5]}}}})
    before = set(tmp_path.rglob("*"))
    assert call("--compare", *argv) == 2
    assert message in capsys.readouterr().err and set(tmp_path.rglob("*")) == before


def test_runs_of_other_classes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "one")
    names = [*CLASS_NAMES[:2], "three"]
    of_size(tmp_path / "two", 8)
    folder = tmp_path / "two" / "synthetic"
    for file in (*folder.glob("*.json"), tmp_path / "two" / "student" / "result.json"):
        file.write_text(file.read_text().replace('"two"', f'"{names[2]}"'))
    assert call("--compare", tmp_path / "one", tmp_path / "two") == 2
    assert "different classes" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--features", "--data"])
def test_options_of_comparisons_act_there_alone(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--run", tmp_path, flag, "digits-on-photos") == 2
    assert f"{flag} acts with --compare" in capsys.readouterr().err
