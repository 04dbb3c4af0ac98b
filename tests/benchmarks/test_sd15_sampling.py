"""Counted FLOP of sampling against those of its network calls, by hand; and what fails costs its own row."""

import pytest
import torch

from benchmarks import sd15, sd15_sampling
from benchmarks.flops import counted
from benchmarks.sd15_sampling import PEERS, ROWS, bench, flop_per_image, markdown
from dfkd.compiled.functions import function, samples

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sources():
    return sd15.placed(sd15.make_sources(64, thin=True), CPU, torch.float32)


@pytest.fixture(scope="module")
def parts(sources):
    """FLOP of one row of a network, of the decoder and of the guidance gradient."""
    found = {}
    for network in ("unet", "decode", "gradient"):
        found[network] = counted(function(network, sources).call, *samples(network, sources, 2, 0))[1] / 2
    image = torch.rand(2, 3, 64, 64)
    found["teacher"] = counted(sources.teacher.logits, image)[1] / 2
    return found


@pytest.mark.parametrize("steps", [5, 10])
def test_flop_of_the_latent_rows_are_those_of_their_calls(sources, parts, steps):
    """Two rows of the UNet a step, a gradient a guided step, the decoder and the teacher once."""
    ends = parts["decode"] + parts["teacher"]
    for row, guided in (("latent", steps), ("late", 2 * steps // 5)):
        wanted = 2 * steps * parts["unet"] + guided * parts["gradient"] + ends
        assert flop_per_image(row, sources, steps) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 5])
def test_flop_without_a_teacher_are_those_of_the_same_calls(sources, parts, steps):
    """Diffusers does what our sampler does; ours shows the teacher the images at the end."""
    for row, ends in (("unguided", parts["decode"] + parts["teacher"]), ("diffusers", parts["decode"])):
        assert flop_per_image(row, sources, steps) == pytest.approx(2 * steps * parts["unet"] + ends, rel=1e-3)


def test_the_published_loop_differentiates_the_unet(sources, parts):
    """A step more than a `latent` one: two UNet rows forward again, and backward through them to the input."""
    more = flop_per_image("published", sources, 4) - flop_per_image("latent", sources, 4)
    assert 4 * 2 * parts["unet"] * 1.8 < more < 4 * 2 * parts["unet"] * 2.6
    assert flop_per_image("unet", sources, 4) == flop_per_image("published", sources, 4)


def test_rows_differ_in_what_they_are_named_after():
    assert [ROWS[name].gradient for name in ("published", "unet", "latent", "late")] == 2 * ["unet"] + 2 * ["latent"]


def test_rows_stand_beside_their_own_base_and_a_failed_one_is_named(sources, monkeypatch):
    """Guided rows beside the published loop, the others beside diffusers, whose compiled row may lack a compiler."""

    def broken(call, **options):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(sd15_sampling, "flop_per_image", lambda *_: 1e9)
    result = bench(sources, [2], 1, 1, "torch")
    rows = {row["row"]: row for row in result["rows"]}
    assert rows.keys() == {*ROWS, *PEERS} - {"diffusers compiled"}
    assert {name: row["base"] for name, row in rows.items() if row["base"] != "published"} == {
        "unguided": "diffusers",
        "diffusers": "diffusers",
    }
    assert rows["published"]["ratio"] == rows["diffusers"]["ratio"] == 1
    assert result["failures"] == [{"row": "diffusers compiled 2", "why": "RuntimeError: no compiler"}]
    text = markdown(result)
    assert "Not measured: diffusers compiled 2: RuntimeError: no compiler." in text and "first call failed" in text
