"""dfkd-report: from folders to one page that stands alone."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dfkd.cli import report
from dfkd.evaluation import figures
from tests.cli.small_generate import status_of
from tests.evaluation.fake_run import STRONG, write_images, write_run

VOID = {"meta", "img", "source", "br"}


def call(*argv: object) -> int:
    return status_of(report.main, *argv)


class Balanced(HTMLParser):
    """Fails where a tag closes that is not the last one opened; keeps the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with its report."""
    root = write_run(tmp_path_factory.mktemp("whole"))
    assert call("--run", root) == 0
    return root


def test_the_page_stands_alone(whole: Path) -> None:
    html = (whole / "report" / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"https?://|<script|<link|@import|url\(", html)
    sources = re.findall(r'(?:src|srcset)="([^"]*)"', html)
    assert len(sources) == 3 + 2 + 1 + 2 * 8  # a strip per class, a sheet per baseline, a mistake, charts in two themes
    for source in sources:
        kind, _, data = source.partition(";base64,")
        assert kind == "data:image/png"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()


def test_the_page_is_well_formed_and_says_what_was_measured(whole: Path) -> None:
    page = Balanced()
    page.feed((whole / "report" / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    text = " ".join(page.text.split())
    for part in ("one & <only>", "76.7 %", "16.7 points behind", "unguided", "BN gap", "1 min 01 s", "dfkd-generate"):
        assert part in text, part
    assert "Not in this report" not in text and "+26.7" not in text  # no strong control: no difference to a baseline


def test_json_and_pictures_lie_beside_it(whole: Path) -> None:
    found = {path.name for path in (whole / "report").iterdir()}
    charts = {"class_balance", "loss_curves", "confidence", "bn_gap", "confusion", "training"}
    charts |= {"reliability", "class_accuracy"}
    sheets = {"contact_sheet", "contact_sheet_noise", "contact_sheet_unguided"}
    assert found == {"report.html", "report.json", "report.settings.json", *(f"{name}.png" for name in charts | sheets)}
    data = json.loads((whole / "report" / "report.json").read_text())
    assert data["accuracy"]["differences"] == {} and data["costs"]["teacher"]["parameters"] > 0
    assert [answer["question"][:3] for answer in data["answers"]] == ["Can", "How", "Is "]
    assert data["errors"]["outcomes"]["teacher_only"] == 5 and data["errors"]["mistakes"][0]["truth"] == "two"
    assert data["images"]["losses"]["cls"]["mean"][0] == 2.0


def test_images_alone_make_a_page_that_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "images", guided=False)
    assert call("--synthetic", images) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["report"] == str(tmp_path / "images-report" / "report.html")
    assert result["missing"] == ["teacher", "student", "baselines"]
    assert (result["images"], result["student_accuracy"], result["teacher_agreement"]) == (12, None, None)
    page = Balanced()
    page.feed(Path(result["report"]).read_text(encoding="utf-8"))
    assert page.open == []
    assert "Not in this report: student" in page.text
    assert "No teacher guided these images" in page.text


def test_reports_of_two_folders_of_images_lie_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert call("--synthetic", write_images(tmp_path / name, guided=False), "--judged", 0) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "one-report", "two-report"}
    before = (page := tmp_path / "one-report" / "report.html").stat().st_mtime_ns
    assert call("--config", tmp_path / "one-report" / "report.settings.json") == 0  # the same again
    assert page.stat().st_mtime_ns > before


def test_differences_are_shown_beside_strong_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "png", lambda figure: b"")  # drawing takes long, and is tried above
    assert call("--run", write_run(tmp_path, STRONG), "--judged", "0") == 0
    text = " ".join((tmp_path / "report" / "report.html").read_text(encoding="utf-8").split())
    assert "+16.7 (+" in text and "ahead of in_pixels" in text and "strong controls are missing" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --run, or --synthetic"),
        (("--run", "absent"), "there is no such folder"),
        (("--run", "."), "run dfkd-generate first"),
        (("--judged", "-1"), "--judged"),
    ],
)
def test_what_cannot_be_reported_is_refused(
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*options) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
