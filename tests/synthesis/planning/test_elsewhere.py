"""Plans for GPUs that are not here: by their memory, shared between them, and never below their ceilings."""

import pytest
import torch

from dfkd.cli.prepare import prepare
from dfkd.synthesis.planning.calls import network_calls
from dfkd.synthesis.planning.data_sheets import SHEETS, DataSheet, devices_of, sheet_of
from dfkd.synthesis.planning.elsewhere import LAUNCH, REACHED, Elsewhere, predict_elsewhere, work_of_group
from dfkd.synthesis.planning.plan import Plan, make_plan
from dfkd.synthesis.planning.words import duration, elsewhere_as_json, elsewhere_in_words
from dfkd_engine.planner import CallPlan
from dfkd_engine.work import Operation, Work, work
from tests.cli.small_generate import save_classifier
from tests.compiled.small_engines import options_of
from tests.synthesis.small_sd import make_small_sd

SMALL_GPU = DataSheet("small", {"float32": 1e9}, 1e9, 4_000_000)


@pytest.mark.parametrize(
    "text, count, name", [("H100", 1, "H100"), ("8xh100", 8, "H100"), (" 2xRTX4090", 2, "RTX4090")]
)
def test_names_of_gpus(text, count, name):
    assert devices_of(text) == (count, SHEETS[name])


@pytest.mark.parametrize("text", ["", "8", "0xH100", "x H100", "H100x8", "V100", "-1xH100"])
def test_unknown_names_are_refused_with_those_that_are_known(text):
    with pytest.raises(ValueError, match="H200, H100, A100, RTX4090, nor several of them such as 8xH100"):
        devices_of(text)


@pytest.mark.parametrize(
    "device, name",
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA GeForce RTX 4090", "RTX4090")],
)
def test_the_sheet_of_a_device(device, name):
    assert sheet_of(device) is SHEETS[name] and sheet_of("Tesla V100") is None


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Options and synthesis on small networks: 4 steps, the last two guided, two on pixels, and what is given."""
    folder = tmp_path_factory.mktemp("small")
    networks = make_small_sd(folder / "prior"), save_classifier(folder / "teacher")
    common = ("--steps", 4, "--guide-from", 0.5, "--refine-steps", 2, "--device", "cpu")

    def of(group, *more):
        options = options_of(*networks, *common, "--group", group, "--batch", group, *more)
        return options, prepare(options)

    return of


def test_the_work_of_a_group_is_that_of_its_calls(planned):
    options, own = planned(8)
    plan, calls = make_plan(options, own, {}), network_calls(own)
    found = work_of_group(own, plan)
    assert found.keys() == {"unet", "decode", "gradient", "pixel_gradient"}
    assert found["unet"].flop == 4 * work(calls["unet"], 8).flop
    assert found["gradient"].flop == 2 * work(calls["gradient"], 8).flop  # two of four steps are guided
    assert found["pixel_gradient"].flop == 2 * work(calls["pixel_gradient"], 8).flop
    assert found["decode"].bytes == work(calls["decode"], 8).bytes


@pytest.mark.parametrize("cfg_to, rows", [(0.5, 1), (1.0, 2)])
def test_a_gradient_through_the_unet_has_the_rows_of_the_steps_that_are_guided(planned, cfg_to, rows):
    """The last two of four steps are; classifier-free guidance acts in the first two, or in all."""
    options, own = planned(8, "--gradient", "unet", "--cfg-to", cfg_to)
    prior, guidance = own.prior, own.guidance
    latent = work_of_group(own, make_plan(options, own, {}))["gradient"].flop
    words = prior.encode_prompts([""]).expand(8 * rows, -1, -1)

    def through(images: int) -> torch.Tensor:
        leaf = torch.zeros(images * rows, 4, 8, 8, requires_grad=True)
        found = prior.denoise(leaf, torch.tensor(1.0), words)
        return torch.autograd.grad(found.sum(), leaf)[0]

    alone = work(lambda images: guidance.gradient(torch.zeros(images, 4, 8, 8), torch.zeros(images).long(), images), 8)
    assert latent == pytest.approx(2 * (alone.flop + work(through, 8).flop), rel=0.01)


def test_a_group_in_parts_has_the_work_of_both_passes(planned):
    """Statistics first, gradients then: a decoding and a teacher more, and nothing else."""
    (options, own), (in_parts, _) = planned(32), planned(32, "--micro-batch", 16)
    whole, cut = (work_of_group(own, make_plan(each, own, {})) for each in (options, in_parts))
    forward = work(lambda rows: own.guidance.taught(own.prior.decode(torch.zeros(rows, 4, 8, 8))), 32).flop
    assert cut["gradient"].flop == pytest.approx(whole["gradient"].flop + 2 * forward, rel=1e-6)
    assert cut["unet"].flop == pytest.approx(whole["unet"].flop)


def test_rows_are_those_of_the_gpus_memory(planned):
    options, own = planned(64)
    small = predict_elsewhere(options, own, 1, SMALL_GPU).plan
    large = predict_elsewhere(options, own, 1, SHEETS["H100"]).plan
    assert small.calls["gradient"].bound == "memory" and small.calls["gradient"].rows < 64
    assert {call.bound for call in large.calls.values()} == {"group"}


def elsewhere(devices: int) -> Elsewhere:
    call = CallPlan(8, 1, 1000, "group")
    plan = Plan(8, 2, {"unet": call, "decode": call}, {}, 2**20, SMALL_GPU.memory)
    parts = {"unet": Work({Operation(2 * 10**9, 0, "float32"): 3}), "decode": Work({Operation(0, 10**9, "x"): 1})}
    return Elsewhere(devices, SMALL_GPU, plan, parts, 0.5)


@pytest.mark.parametrize("devices, images, groups", [(1, 8, 1), (1, 9, 2), (8, 64, 1), (8, 65, 2), (8, 1, 1)])
def test_groups_are_shared_out(devices, images, groups):
    """A group takes 6 s fused and 7 s eagerly; devices that have none wait for those that do."""
    found = elsewhere(devices)
    assert (found.floor(images, fused=True), found.floor(images, fused=False)) == (6 * groups, 7 * groups)
    assert found.write_seconds(images) == 0.5 * -(-images // devices)
    rest = 3 * groups * LAUNCH + found.write_seconds(images)
    assert found.predicted(images) == pytest.approx(tuple(6 * groups / share + rest for share in REACHED))


def test_in_words_and_as_json():
    found = elsewhere(8)
    words, plain = elsewhere_in_words(found, 65), elsewhere_as_json(found, 65)
    assert "plan for 8 small, each 0.001 TB/s, 0.004 GB" in words
    assert "no less than 12 s for 65 images" in words and "eagerly no less than 14 s" in words
    low, high = (duration(seconds) for seconds in found.predicted(65))
    assert words.splitlines()[-1].startswith(f"predicted: {low} to {high} compiled, a forecast: 60 to 40 % of the")
    assert (plain["floor_seconds"], plain["eager_floor_seconds"], plain["devices"]) == (12, 14, 8)
    assert plain["work"]["unet"] == {"flop": round(6e9 / 8), "bytes": 0} and plain[
        "predicted_seconds"
    ] == found.predicted(65)
