"""Controls: as many steps as take the seconds of the guided images, counted once."""

import json
from pathlib import Path
from typing import Any

import pytest

from dfkd.config import GenerateCommand
from dfkd.synthesis import controls
from dfkd.synthesis.controls import CONTROLS, STEPS, at_equal_seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[GenerateCommand]:
    """Images take 0.5 s each and 0.01 s a step, the guided ones 200 s together; returns what was tried."""
    tried: list[GenerateCommand] = []

    def seconds(folder: Path) -> float:
        if folder.name == "guided":
            return 200.0
        asked = tried[-1]
        method = asked.generate.method
        steps = asked.generate.guidance.refine_steps
        steps = int(method.partition("steps=")[2].rstrip(")").split(",")[0]) if "(" in method else steps
        return asked.count * (0.5 + 0.01 * steps)

    monkeypatch.setattr(controls.command, "run", lambda asked, say: tried.append(asked))
    monkeypatch.setattr(controls, "images_seconds", seconds)
    return tried


def asked(out: Path, name: str, **settings: Any) -> GenerateCommand:
    given = {key.replace("-", "_"): value for key, value in CONTROLS[name].settings.items()}
    return GenerateCommand.of(out=out / "synthetic", count=100, batch=20, group=10, **{**settings, **given})


def test_strong_controls_take_the_seconds_of_the_guided_images(clock: list[GenerateCommand], tmp_path: Path) -> None:
    found = at_equal_seconds(asked(tmp_path / "p", "unguided-pixels"), CONTROLS["unguided-pixels"], Path("guided"))
    assert found.generate.guidance.refine_steps == 150  # 100 images of (0.5 + 1.5) s
    assert json.loads((tmp_path / "p" / STEPS).read_text()) == {"steps": 150, "guided_seconds": 200.0}
    assert {one.count for one in clock} == {20}
    wanted = asked(tmp_path / "d", "deepinversion", bn_weight=0.0)
    inverted = at_equal_seconds(wanted, CONTROLS["deepinversion"], Path("guided"))
    assert inverted.generate.method == "deepinversion(steps=150, bn_weight=0)"


def test_the_steps_are_counted_once(clock: list[GenerateCommand], tmp_path: Path) -> None:
    wanted = asked(tmp_path, "unguided-pixels")
    (tmp_path / STEPS).write_text('{"steps": 7, "guided_seconds": 1.0}')
    assert at_equal_seconds(wanted, CONTROLS["unguided-pixels"], Path("guided")).generate.guidance.refine_steps == 7
    assert at_equal_seconds(asked(tmp_path, "noise"), CONTROLS["noise"], Path("guided")).generate.method == "noise"
    assert clock == []


def test_one_step_where_the_rest_takes_longer_than_the_guided_images(
    clock: list[GenerateCommand], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controls, "images_seconds", lambda folder: 1.0 if folder.name == "guided" else 50.0)
    found = at_equal_seconds(asked(tmp_path, "unguided-pixels"), CONTROLS["unguided-pixels"], Path("guided"))
    assert found.generate.guidance.refine_steps == 1
