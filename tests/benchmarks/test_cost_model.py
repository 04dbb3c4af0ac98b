"""Predictions beside measurements: the command rehearsed whole, and its tables."""

import json
import sys

import pytest

from benchmarks import cost_model
from benchmarks.cost_model import CASES, markdown, shares, updated
from dfkd.cli.generate import run
from dfkd.cli.generate_options import GenerateOptions
from dfkd.cli.options import parse, plain
from dfkd.presets import PRESETS
from tests.cli.small_generate import save_classifier


def in_this_process(command, *words):
    """What the command's process would print; starting one takes longer than all that it does here."""
    assert command == "dfkd-generate"
    return plain(run(parse(GenerateOptions, [str(word) for word in words], command, PRESETS)))


@pytest.mark.slow
def test_the_command_is_rehearsed(monkeypatch, tmp_path, capsys):
    """One demo case and one of a reduced Stable Diffusion, few images, and what Stable Diffusion would cost."""
    teacher = save_classifier(tmp_path / "teacher", names=tuple("abcdefghij"), size=32)
    monkeypatch.setattr(cost_model, "call", in_this_process)
    few = "--group 4 --batch 4 --shard-size 4 --count 4 --steps 3 --refine-steps 1 --size 32"
    words = ["--rehearse", "--repeats", "1", "--teacher", str(teacher), "--cases", "demo,reduced-sd-late"]
    monkeypatch.setattr(sys, "argv", ["cost_model", *words, "--generate", few])
    cost_model.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["cases"].keys() == {"demo", "reduced-sd-late"}
    for row in result["cases"].values():
        assert row["images"] == 4 and row["predicted_seconds"][0] > 0 and row["seconds"][0] > 0
        assert row["error"] == pytest.approx(row["predicted_seconds"][0] / row["seconds"][0] - 1)
        assert row["work"].keys() <= row["timings"].keys() and row["work"]["unet"]["flop"] > 0
    assert result["cases"]["demo"]["work"] != result["cases"]["reduced-sd-late"]["work"]
    modes = {row["mode"]: row for row in result["stable_diffusion"]}
    assert modes["published"]["flop_per_image"] > 2 * modes["late"]["flop_per_image"]
    assert "here_seconds" in modes["late"] and "here_seconds" not in modes["published"]
    for row in modes.values():
        one, eight = row["gpus"].values()
        assert one["floor_seconds"] == pytest.approx(8 * eight["floor_seconds"], rel=0.01)
        assert one["floor_seconds"] < one["seconds"][0] < one["seconds"][1]
    text = markdown(result)
    assert text.count("| demo | ") == 5 and "| late | " in text  # one of the run, four networks


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_a_run_that_can_be_had(case):
    """And its options act: no two cases are the same run."""

    def of(name: str) -> GenerateOptions:
        words = ["--out", ".", "--preset", "demo", *CASES[name].words.split()]
        return parse(GenerateOptions, words, "dfkd-generate", PRESETS)

    assert of(case).count >= 32
    assert all((of(case), CASES[case].reduced) != (of(name), CASES[name].reduced) for name in CASES if name != case)


def test_a_share_is_of_the_whole_group():
    """Two calls a group of four images, half a second each: a quarter of a second an image."""
    row = {
        "group": 4,
        "work": {"unet": {"flop": 10**9, "bytes": 5}},
        "timings": {"unet": {"seconds": 0.5, "calls_per_group": 2.0}, "write": {"seconds": 1.0, "calls_per_group": 4}},
    }
    found = shares(row, {"flops": 16e9, "bytes_per_second": 1.0})
    assert found == {"unet": {"flop": 10**9, "bytes": 5, "milliseconds": 250.0, "of_matmul": 0.25}}


def test_some_cases_are_recorded_into_those_that_stay():
    record = {"machine": {"device": "a"}, "cases": {"demo": 1, "demo-unet": 2}, "stable_diffusion": [3]}
    result = {"machine": {"device": "a"}, "cases": {"demo-unet": 4}}
    assert updated(record, result) == {**record, "cases": {"demo": 1, "demo-unet": 4}}
    with pytest.raises(SystemExit, match="a is on record, and this is b: record all cases"):
        updated(record, {"machine": {"device": "b"}, "cases": {}})


def test_an_unknown_case_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cost_model", "--cases", "demo,sdxl"])
    with pytest.raises(SystemExit):
        cost_model.main()
    assert "unknown 'sdxl'; known are demo, demo-unguided" in capsys.readouterr().err
