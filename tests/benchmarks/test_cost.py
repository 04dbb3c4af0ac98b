"""What presets cost: the record is of the presets as they are, and FLOP are those of the calls that are made."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import cost, sd15
from benchmarks.flops import counted
from dfkd.config import GenerateConfig, read_preset, section
from dfkd.synthesis.intermediates import Intermediates
from dfkd_engine import memory


def recorded():
    return json.loads(cost.FILE.read_text())


def test_the_record_is_of_the_presets_as_they_are():
    rows = recorded()["presets"]
    assert [row["preset"] for row in rows] == list(cost.PRESETS)
    for row in rows:
        assert row["generate"] == json.loads(json.dumps(section(read_preset(row["preset"]), "generate")))
        assert row["images"] % row["snapshots"] == 0 < row["flop"]


def test_trainings_are_counted_again():
    rows = [row for row in recorded()["training"] if row["preset"] == "cifar10"]
    assert rows == list(cost.training_of("cifar10"))
    teacher, student = rows
    assert teacher["images"] == 200 * 50_000 // 256 * 256 and student["images"] == 240 * 47_500 // 256 * 256
    forward = counted(cost.classifier("wrn40_2", "ab").logits, torch.rand(1, 3, 32, 32))[1]
    assert 2.9 * forward < teacher["flop"] < 3 * forward  # the first layer has no gradient in the image


def test_the_way_leads_from_one_preset_to_the_other():
    settings = {}
    for step in cost.way(Path("tiny"))[:7]:
        settings |= step.changes
    found, wanted = GenerateConfig.preset("cifar10", **settings), GenerateConfig.preset("cifar10-fast")
    for own in ("sampler", "steps", "keep_intermediates", "size", "cfg_to", "guide_from", "gradient", "bn_stats",
                "group", "cutmix_every"):  # fmt: skip
        assert found.flat()[own] == wanted.flat()[own], own
    steps, presets = recorded()["steps"], {row["preset"]: row for row in recorded()["presets"]}
    assert [row["name"] for row in steps] == [step.name for step in cost.way(Path("tiny"))]
    assert steps[0]["flop"] == presets["cifar10"]["flop"] and "cifar10-fast" in steps[6]["name"]
    assert steps[6]["flop"] == pytest.approx(presets["cifar10-fast"]["flop"], rel=1e-3)  # of a smaller teacher


@pytest.fixture(scope="module")
def thin():
    return sd15.make_prior(64, "fp32", thin=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "changes"),
    [("cifar10", {"keep_intermediates": 1, "cutmix_every": 2}), ("cifar10-fast", {"batch": 2}),
     ("domainnet-sketch", {"keep_intermediates": 1, "cutmix_every": 2})],
)  # fmt: skip
def test_flop_of_a_preset_are_those_of_its_calls(thin, preset, changes):
    """Of fewer steps and smaller groups, whose images the teacher is shown once more at the end."""
    own = {"size": 64, "dtype": "fp32", "steps": 5, "group": 4, **changes}
    pipe = cost.pipeline(thin, preset, section(read_preset(preset), "generate")["teacher"], **own)
    found = cost.synthesis(pipe)
    maker = Intermediates(pipe, 1) if "keep_intermediates" in changes else pipe
    maker(range(4 * found["snapshots"]))  # texts are encoded
    with memory._Live() as live:
        maker(range(4 * found["snapshots"]))
    side = pipe.teacher.input_size
    look = counted(pipe.teacher.logits, torch.rand(4 * found["snapshots"], 3, side, side))[1]
    assert 4 * found["flop"] == live.flop - look


def test_hours_are_flop_over_a_share_of_the_peak():
    row = {"preset": "p", "generate": {}, "images": 10, "snapshots": 5, "flop": 989e12 * 3600, "call": 1}
    text = cost.presets_table({**recorded(), "presets": [row]})
    cells = [cell.strip() for cell in text.splitlines()[2].split("|")][1:-1]
    assert cells[2] == "2" and [float(cell) for cell in cells[5:]] == [4.0, 6.67, 13.3, 25.0]
