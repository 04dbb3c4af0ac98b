"""The ablation: its rows are runs that can be read, seconds are equal, and differences are paired by seed."""

import json

import pytest

from benchmarks import ablation
from benchmarks.ablation import DEFAULT, Ablation, calibrate, difference, judge, markdown, teach


def test_every_row_is_a_run_that_differs_from_the_default(tmp_path):
    own = Ablation.read(tmp_path)
    teach(Ablation.read(tmp_path, rehearse=True), seed=0)
    default = own.job(own.rows[0], 0)
    assert own.rows[0].name == DEFAULT and len(own.rows) > 2
    for row in own.rows[1:]:
        job = own.job(row, 0)
        given, learned = (vars(job.variants[0])[name] for name in ("generate", "distill"))
        assert row.differs and row.says
        assert (given.replace(out=tmp_path), learned.replace(out=tmp_path, data=("x",))) != (
            default.variants[0].generate.replace(out=tmp_path),
            default.variants[0].distill.replace(out=tmp_path, data=("x",)),
        ) or "rounds" in row.differs, row.name


def test_a_row_gets_the_images_that_take_the_defaults_seconds(tmp_path, monkeypatch):
    own = Ablation.read(tmp_path, rehearse=True)
    teach(own, seed=0)
    (tmp_path / "counts").mkdir()
    monkeypatch.setattr(ablation, "_spent", lambda job: 2.0 + 3.0 * job.variants[0].generate.count / 4)
    default = calibrate(own, own.rows[0], None)
    assert default == {"count": 8, "seconds": 8.0}
    assert calibrate(own, own.rows[1], 14.5) == {"count": 16, "seconds": 14.0}
    with pytest.raises(ValueError, match=r"a group of 4 takes 5 s of 4"):
        calibrate(own, own.rows[2], 4.0)


@pytest.mark.slow
def test_students_are_judged_once_and_on_validation_images(tmp_path):
    own = Ablation.read(tmp_path, rehearse=True)
    teach(own, seed=1)
    first = judge(own, own.rows[0], 1, 8)
    assert first["images"] == 8 and first["seconds"] > 0 and 0 <= first["accuracy"] <= 1
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    assert judge(own, own.rows[0], 1, 8) == first
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    kept = json.loads((tmp_path / "seed-1" / DEFAULT / "judged.json").read_text())
    assert kept == first and own.default["evaluate"]["split"] == "validation"


def test_differences_are_paired_by_seed():
    middle, half = difference([0.5, 0.7, 0.6], [0.4, 0.5, 0.3])
    assert middle == pytest.approx(0.2) and half == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert difference([0.5], [0.4])[1] == float("inf")
    machine = {"device": "it", "threads": 1, "versions": {"torch": "2"}, "date": "today"}
    rows = {
        DEFAULT: {"says": "the default", "images": [4, 4], "seconds": [1, 3], "accuracy": [0.5, 0.6]},
        "x": {"says": "with x", "images": [2, 2], "seconds": [2, 2], "accuracy": [0.4, 0.5]},
    }
    lines = markdown({"rows": rows, "failed": {"y": "too slow"}, "split": "validation", "machine": machine})
    assert "| with x | 2 | 2 | 45.0 | 40.0 50.0 | -10.0 ± 0.0 |" in lines and "Not judged: y: too slow" in lines


def test_an_unknown_row_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no row 'nothing'"):
        Ablation.read(tmp_path, only=["nothing"])
