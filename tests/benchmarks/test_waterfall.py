"""The waterfall: its rows lead from the published settings to the preset, and its gains multiply to the whole."""

import io
import json
import math
import sys
from itertools import pairwise

import pytest
import torch

from benchmarks import waterfall
from benchmarks.guidance_paths import ROWS, options_of
from benchmarks.waterfall import accuracies
from benchmarks.waterfall_rows import ALGORITHM, FIXED, PUBLISHED, TECHNIQUES, Technique, Way, overrides, techniques
from benchmarks.waterfall_table import document, markdown, plot, sentence
from tests.cli.small_generate import save_classifier


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A rehearsal in this process: every row in a turn, with networks of the demo and a small teacher."""
    folder = tmp_path_factory.mktemp("waterfall")
    teacher = save_classifier(folder / "teacher", size=32, architecture="resnet8_half")
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as out:
        given = ["--rehearse", "--teacher", str(teacher), "--singles", "1", "--repeats", "1"]
        patch.setattr(sys, "argv", ["waterfall", *given])
        patch.setattr(sys, "stdout", out)
        waterfall.main()
        return json.loads(out.getvalue().splitlines()[-1])


def test_from_the_published_settings_to_the_preset(tmp_path):
    """One technique a row: a fixed one leaves every option, another takes over the preset's for its own."""
    assert overrides(PUBLISHED) == ROWS["published"] and overrides(TECHNIQUES[-1]) == {}
    for before, technique in pairwise(TECHNIQUES):
        left = overrides(before).keys() - overrides(technique).keys()
        assert left == set(technique.takes) and len(left) == (technique.kind == ALGORITHM)
    preset = options_of(tmp_path, "cpu", tmp_path, {}, [])
    published = options_of(tmp_path, "cpu", tmp_path, ROWS["published"], [])
    changed = {name for technique in TECHNIQUES for name in technique.takes}
    assert changed == {name for name in ROWS["published"] if getattr(preset, name) != getattr(published, name)}


@pytest.mark.slow
def test_gains_multiply_to_the_whole(result):
    rows, product = result["rows"], result["products"]
    speeds = [row["images_per_second"] for row in rows]
    assert math.prod(row["gain"] for row in rows[1:]) == pytest.approx(speeds[-1] / speeds[0], rel=1e-12)
    assert product["fixed"] * product["algorithm"] == pytest.approx(product["together"], rel=1e-12)
    for before, row in pairwise(rows):
        assert row["gain"] == pytest.approx(row["images_per_second"] / before["images_per_second"], rel=1e-12)
        assert row["gain_low"] <= row["gain_high"] and len(row["seconds_per_image"]) == 1


@pytest.mark.slow
def test_fixed_rows_make_the_same_images_and_others_do_not(result):
    rows = {row["name"]: row for row in result["rows"]}
    assert [row["name"] for row in result["rows"] if row["kind"] == FIXED] == [
        *("our sampler", "groups", "channels_last", "engines"),
    ]
    for row in result["rows"]:
        if row["kind"] == FIXED:
            assert row["pixel_difference"] < 0.5, row
        assert (row["gradient_cosine"] is not None) == (row["kind"] == ALGORITHM)
    assert 0 < rows["clean latent"]["gradient_cosine"] < 0.99
    assert rows["group statistics"]["gradient_cosine"] != rows["late guidance"]["gradient_cosine"]
    assert rows["repeats"]["gradient_cosine"] == rows["group statistics"]["gradient_cosine"], "the first of them"
    assert rows["groups"]["images_at_a_time"] == 8 and rows["published"]["images_at_a_time"] == 1
    assert any("no engine is built" in line for line in rows["engines"]["networks"])


@pytest.mark.slow
def test_tables_and_picture(result):
    recorded = result | {"rows": [row | {"student_accuracy": 0.8, "student_of": "published"} for row in result["rows"]]}
    product, text = result["products"], document(recorded)
    assert text.count("80.0 % (published)") == len(result["rows"]) - 1 and "not run" not in text
    assert markdown(result).count("| not run |") == len(result["rows"])
    assert f"together x {product['together']:.1f}." in text and "engines: none built" in text
    assert f"x {product['together']:.1f}" in sentence(recorded) and "reaches 80.0 %" in sentence(recorded)
    assert "student" not in sentence(result)
    out = io.BytesIO()
    plot(recorded, out)
    assert out.getvalue().startswith(b"\x89PNG") and len(out.getvalue()) < 200_000


def test_a_fixed_row_has_the_student_of_the_row_that_it_equals():
    asked = []

    def accuracy(technique):
        asked.append(technique.name)
        return len(asked) / 10

    names = ("published", "our sampler", "clean latent", "refinement", "engines")
    rows = [technique for technique in TECHNIQUES if technique.name in names]
    found = accuracies(rows, accuracy)
    assert asked == ["published", "clean latent", "refinement"]
    of = ("published", "published", "clean latent", "refinement", "refinement")
    assert found == list(zip((0.1, 0.1, 0.2, 0.3, 0.3), of, strict=True))


def test_a_row_that_fails_ends_it_by_name(tmp_path):
    def fails(path):
        raise RuntimeError("no such network")

    ways = {"works": Way(lambda path: path.mkdir(), 1, None), "fails": Way(fails, 1, None)}
    with pytest.raises(SystemExit, match="fails: RuntimeError: no such network"):
        waterfall.measure(ways, tmp_path, 1, torch.device("cpu"))


def test_kernels_have_a_row_where_a_run_takes_them(monkeypatch):
    assert "fused kernels" not in [row.name for row in techniques(torch.device("cpu"))]
    monkeypatch.setattr("dfkd.kernel_choice.importlib.util.find_spec", lambda _: True)
    rows: list[Technique] = techniques(torch.device("cuda"))
    assert [row.name for row in rows[-3:]] == ["refinement", "fused kernels", "engines"]


@pytest.mark.parametrize("more", ["--record", "--students"])
def test_a_rehearsal_is_not_recorded(more, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["waterfall", "--rehearse", more])
    with pytest.raises(SystemExit):
        waterfall.main()
    assert "a rehearsal is not recorded" in capsys.readouterr().err
