"""What an image of a published prior costs: sizes are the published ones, and the sum is that of its parts."""

import json

import pytest
import torch
from torch import nn

from benchmarks import priors
from benchmarks.recording import RESULTS
from dfkd_engine.priors.families import FAMILIES

PARAMETERS = {  # of the published weights
    "stable-diffusion-v1-5": 859_520_964,
    "stable-diffusion-2-1": 865_910_724,
    "stable-diffusion-xl-base-1.0": 2_567_463_684,
    "ddpm-cifar10-32": 35_746_307,
}


def recorded():
    return {row["model"]: row for row in json.loads((RESULTS / "priors-cpu.json").read_text())["rows"]}


def test_the_recorded_models_have_the_published_sizes():
    rows = recorded()
    assert [of.model for of in priors.MODELS] == list(rows)
    assert {name: rows[name]["parameters"] for name in PARAMETERS} == PARAMETERS
    for row in rows.values():
        parts = row["steps"] * (row["rows"] * row["denoiser_flop"] + row["gradient_flop"]) + row["decode_flop"]
        assert row["image_flop"] == parts > 0


@pytest.mark.parametrize("model", ["ddpm-cifar10-32", "DiT-XL-2-256"])
def test_a_row_is_measured_again(model):
    """On the recorded teacher's FLOP, since a ResNet-34 takes a while: a layer of known arithmetic is in its place."""
    of = next(of for of in priors.MODELS if of.model == model)
    with torch.device("meta"):
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * priors.TEACHER_SIDE**2, 1))
    row, before = priors.measure(of, teacher), recorded()[model]
    assert row["denoiser_flop"] == before["denoiser_flop"] and row["decode_flop"] == before["decode_flop"]
    through = 2 * 2 * 3 * priors.TEACHER_SIDE**2  # forward, and the gradient in the image
    assert row["gradient_flop"] - through < before["gradient_flop"]
    if not of.vae:
        assert row["gradient_flop"] == through


def test_every_family_is_in_the_table():
    text = priors.kinds({})
    assert all(f"| {family.name} | {family.denoiser} |" in text for family in FAMILIES)
