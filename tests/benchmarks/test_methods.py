"""The benchmark of methods: its file, its table and its pictures."""

import json

import pytest
from PIL import Image

from benchmarks import methods
from benchmarks.ablation import DEFAULT
from dfkd.config import GenerateCommand, GenerateConfig
from dfkd.config.synthesis import ADVERSARIAL_METHODS


def test_every_method_that_learns_is_in_the_file(tmp_path):
    made = methods.read(tmp_path)
    settings = {row.name: {**made.default["generate"], **row.differs.get("generate", {})} for row in made.rows}
    asked = {name: GenerateCommand.of(out=tmp_path, **_flat(own)) for name, own in settings.items()}
    names = {one.generate.method.partition("(")[0] for one in asked.values()}
    assert names == {"guided", *ADVERSARIAL_METHODS} and asked[DEFAULT].generate.method == GenerateConfig().method
    assert made.default["preset"] == "demo" and made.split == "validation"


def _flat(settings):
    return {name.replace("-", "_"): value for name, value in settings.items()}


def test_the_table_has_the_best_first():
    def row(accuracy, **differs):
        measured = {"accuracy": [accuracy], "images": [8], "seconds": [2.4], "teacher_accuracy": [0.962]}
        return {"says": f"of {accuracy}", "differs": differs, **measured}

    rows = {DEFAULT: row(0.5), "fast": row(0.75, generate={"method": "fast(steps=2)"})}
    machine = {"device": "CPU", "threads": 1, "versions": {"torch": "2"}, "date": "today"}
    text = methods.markdown(
        {"rows": rows, "split": "test", "steps": 260, "machine": machine, "failed": {"cmi": "slow"}}
    )
    lines = text.splitlines()
    assert lines[2] == "| of 0.75 | 75.0 | 8 | 2 | `fast(steps=2)` |" and lines[3].endswith("| `guided` |")
    assert text.endswith("- cmi: slow")
    assert "260 steps each, real images of the test split, teacher 96.2 %" in text


@pytest.mark.slow
def test_a_rehearsal_runs_every_row_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["methods", "--rehearse", "--out", str(tmp_path)])
    methods.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    # on a busy machine a row of half a second may not fit into the default's; it is told then
    assert {*result["rows"], *result["failed"]} == {row.name for row in methods.read(tmp_path).rows}
    assert len(result["rows"]) > 1
    lines = Image.open(tmp_path / "methods-demo-cpu-images.png")
    assert lines.size == (10 * 32 * methods.TIMES, len(result["rows"]) * 32 * methods.TIMES)
    assert (tmp_path / "methods-demo-cpu-losses.png").stat().st_size > 5000
