"""Controls: as many steps as take the seconds of the guided images, counted once."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dfkd.config import GenerateCommand
from dfkd.synthesis import controls
from dfkd.synthesis.controls import CONTROLS, STEPS, at_equal_seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[GenerateCommand]:
    """A call of images takes 10 s and 0.2 s a step of a control, 40 s where they are guided; returns what was tried."""
    tried: list[GenerateCommand] = []

    def trial(asked: GenerateCommand) -> float:
        tried.append(asked)
        method, steps = asked.generate.method, asked.generate.guidance.refine_steps
        if method == "guided" and not steps:
            return 40.0
        return 10 + 0.2 * (int(re.findall(r"steps=(\d+)", method)[0]) if method != "guided" else steps)

    monkeypatch.setattr(controls, "trial", trial)
    return tried


def asked(out: Path, name: str, **settings: Any) -> GenerateCommand:
    given = {key.replace("-", "_"): value for key, value in CONTROLS[name].settings.items()}
    return GenerateCommand.of(out=out / "synthetic", count=100, batch=20, group=10, **{**settings, **given})


def guided(out: Path) -> GenerateCommand:
    return GenerateCommand.of(out=out / "synthetic", count=100, batch=20, group=10)


def test_strong_controls_take_the_seconds_of_guided_images(clock: list[GenerateCommand], tmp_path: Path) -> None:
    wanted = asked(tmp_path / "p", "unguided-pixels")
    found = at_equal_seconds(wanted, CONTROLS["unguided-pixels"], guided(tmp_path))
    assert found == wanted.replace(refine_steps=150)  # 10 + 150 * 0.2 s
    assert json.loads((tmp_path / "p" / STEPS).read_text())["steps"] == 150
    wanted = asked(tmp_path / "d", "deepinversion", bn_weight=0.0)
    inverted = at_equal_seconds(wanted, CONTROLS["deepinversion"], guided(tmp_path))
    assert inverted.generate.method == "deepinversion(steps=150, bn_weight=0)"


def test_the_steps_are_counted_once(clock: list[GenerateCommand], tmp_path: Path) -> None:
    (tmp_path / STEPS).write_text('{"steps": 7}')
    wanted = asked(tmp_path, "unguided-pixels")
    found = at_equal_seconds(wanted, CONTROLS["unguided-pixels"], guided(tmp_path))
    assert found.generate.guidance.refine_steps == 7
    noise = asked(tmp_path, "noise")
    assert at_equal_seconds(noise, CONTROLS["noise"], guided(tmp_path)) == noise and clock == []


def test_one_step_where_the_rest_takes_longer_than_guided_images(
    clock: list[GenerateCommand], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controls, "trial", lambda asked: 50.0 if asked.generate.guidance.refine_steps else 1.0)
    found = at_equal_seconds(asked(tmp_path, "unguided-pixels"), CONTROLS["unguided-pixels"], guided(tmp_path))
    assert found.generate.guidance.refine_steps == 1


def test_a_trial_is_one_call_of_whole_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[GenerateCommand] = []
    monkeypatch.setattr(controls.command, "run", lambda asked, say: tried.append(asked))
    monkeypatch.setattr(controls, "read_manifest", lambda folder: (None, [{"seconds": 1.5}, {"seconds": 2}]))
    assert controls.trial(guided(tmp_path).replace(batch=25)) == 3.5
    assert (tried[0].count, tried[0].out.exists()) == (20, False)
    assert controls.trial(guided(tmp_path).replace(batch=25, keep_intermediates=3)) == 3.5 / 4
    assert tried[1].count == 80  # of 20 trajectories, which take what 20 images take else
