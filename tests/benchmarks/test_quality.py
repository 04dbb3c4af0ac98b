"""The judged job: the file with its controls, and several seeds of a run that takes seconds."""

import json

import pytest

from benchmarks import quality
from dfkd.config import GenerateConfig
from dfkd.run import read_job


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(quality.ROOT)  # the file names a method by its path from there


def test_the_file_is_the_demo_preset_with_every_control(tmp_path):
    ours, *controls = read_job(quality.read_file("demo"), tmp_path, seed=4).variants
    assert {ours.name or "guided", *(control.name for control in controls)} == quality.NAMES.keys()
    assert ours.generate.generate == GenerateConfig.preset("demo")
    own = {control.name: control.generate.generate.guidance for control in controls}
    assert own["unguided_pixels"].start == 1 and own["unguided_pixels"].refine_steps == 63
    assert own["guided_without_pixels"].start < 1 and own["guided_without_pixels"].refine_steps == 0
    for control in controls:
        assert (control.generate.count, control.generate.seed) == (ours.generate.count, 4)
        assert control.distill.distill == ours.distill.distill


@pytest.mark.slow
def test_seeds_side_by_side_and_started_again(tmp_path, monkeypatch, capsys):
    """A second start does nothing twice, and says the same."""

    def results():
        monkeypatch.setattr("sys.argv", ["quality", "demo", "--seeds", "2", "--rehearse", "--out", str(tmp_path)])
        quality.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    file = quality.read_file("demo", rehearse=True)
    few = {name: file["baselines"][name] for name in ("deepinversion", "prior_data")}
    small = {**file["generate"], "count": 10, "steps": 3}
    monkeypatch.setattr(quality, "read_file", lambda *_: {**file, "generate": small, "baselines": few})
    found = results()
    assert len(found["student"]) == len(found["teacher"]) == len(found["seconds"]) == 2
    assert found["baselines"].keys() == {"unguided", *few} and found["images"] == 10
    assert all(set(seed) == {"teacher", "guided", "unguided", *few} for seed in found["seconds"])
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert results() == found
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
