"""A published preset from list files to a tested student by dfkd-run, on reduced networks of a prior in SD's format."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfkd.cli import run as cli
from dfkd.config import presets
from dfkd.data import open_folder
from tests.cli.small_generate import status_of

# Smaller than the preset: networks, sizes, steps and amounts. All else, and for sketches the rounds, is the preset's.
FILE = """
preset = "{preset}"

[teacher]
data = "list:{lists}/toy_{{split}}.txt?classes={classes}"
architecture = "resnet8"
input-size = 16
epochs = "none"
steps = 3
batch-size = 8
augment = "crop-flip"
device = "cpu"

[generate]
prior = "{prior}"
size = 16
count = {count}
steps = 5
cutmix-every = 2
device = "cpu"
{rounds}
[distill]
student = "resnet8"
epochs = "none"
steps = 2
batch-size = 8
augment = "crop-flip"
device = "cpu"

[evaluate]
data = "list:{lists}/toy_{{split}}.txt?classes={classes}"
device = "cpu"
"""
ROUNDS = """
[rounds]
rounds = 4
refresh-every = 2
adv-from = 2
epochs = "none"
steps = 2
"""


def write_lists(folder: Path, names: tuple[str, ...]) -> None:
    """DomainNet's layout: lines `path label` for each split, and the names in the order of the labels."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for split, each in (("train", 12), ("test", 2)):
        lines = []
        for label, name in enumerate(names):
            for number in range(each):
                path = folder / "toy" / name / f"{split}{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
                lines.append(f"toy/{name}/{path.name} {label}")
        (folder / f"toy_{split}.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("preset", ["cifar10", "domainnet-sketch"])
def test_from_lists_to_a_tested_student(
    preset: str, tmp_path: Path, small_prior: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = presets()[preset]["generate"]
    names, rounds = tuple(asked["classes"]), preset == "domainnet-sketch"
    write_lists(tmp_path / "lists", names)
    count = 40 * 5 if rounds else 20 * 5  # groups of 20 trajectories of five images
    facts = {"preset": preset, "lists": tmp_path / "lists", "classes": ",".join(names), "prior": small_prior}
    (tmp_path / "job.toml").write_text(FILE.format(**facts, count=count, rounds=ROUNDS if rounds else ""))
    out = tmp_path / "out"
    assert status_of(cli.main, tmp_path / "job.toml", "--out", out) == 0, capsys.readouterr().err
    tests = json.loads((out / "evaluation.json").read_text())
    assert tests["images"] == 20 and 0 <= tests["student"]["accuracy"] <= 1
    records = list(open_folder(out / "synthetic").records())
    assert len(records) == count and [record.step for record in records[:5]] == [0, 1, 2, 3, None]
    finished = records[4::5]
    assert all(record.box is not None and record.partner % 5 == 4 for record in finished)
    assert [record.partner // 5 for record in finished[:20]] == [(t + 10) % 20 for t in range(20)]  # the class's other
    assert {record.prompt for record in records} == {asked["prompt"]}
    assert ("adv" in finished[-1].losses) == rounds and "adv" not in finished[0].losses
