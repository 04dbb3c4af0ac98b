"""The plan: calls that memory and 2^31 elements allow, the calls that a pipeline then makes, and their seconds."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.flops import counted
from dfkd.config import GenerateConfig
from dfkd.runtime import Rank
from dfkd.synthesis import plan
from dfkd.synthesis.guidance import Guidance
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd.synthesis.plan import make_plan, predict
from dfkd.synthesis.run import open_run
from dfkd_engine import memory
from dfkd_engine.priors.prior import Prior
from tests.synthesis.small_networks import classifier
from tests.synthesis.small_sd import make_small_sd
from tests.synthesis.tinted import Tinted

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return Prior.from_pretrained(make_small_sd(tmp_path_factory.mktemp("plan")))


@pytest.fixture
def piped(prior):
    def piped(**settings):
        common = {"group": 12, "batch": 24, "steps": 4, "device": "cpu", "backend": "eager", "guide_from": 0.5}
        return GuidedPipeline(prior, classifier(size=16), GenerateConfig.of(**{**common, **settings}))

    return piped


def with_memory(monkeypatch, pipe, images, network="gradient"):
    """Let the device hold calls of a network of so many images, of two groups a pass."""
    found = make_plan(pipe, pipe.config)
    usable = found.held + found.needs[network].bytes(images)
    monkeypatch.setattr(plan, "device_bytes", lambda device: -(-usable * 10 // 6) + 1)
    return make_plan(pipe, pipe.config)


def test_calls_are_as_asked_where_memory_allows(piped):
    found = make_plan(pipe := piped(), pipe.config)
    assert (found.call_size, found.group, found.bound, found.images) == (24, 12, "", 24)
    assert found.rows == {"unet": 24, "decode": 24, "gradient": 12}  # a gradient is of one group
    assert found.needs["gradient"].row > found.needs["decode"].row > 0 and found.memory > 0
    cfg = make_plan(pipe := piped(cfg=1), pipe.config).needs["unet"].row  # one row an image, not two
    assert 0.4 < cfg / found.needs["unet"].row < 0.6
    alone = make_plan(pipe := piped(bn_stats="image", batch=40), pipe.config)
    assert (alone.group, alone.images) == (1, 40) and set(alone.rows.values()) == {40}


@pytest.mark.parametrize("images, calls", [(7, 6), (11, 6), (5, 4), (1, 1), (0, 1)])  # parts of a group are alike
def test_memory_cuts_a_group(piped, monkeypatch, images, calls):
    found = with_memory(monkeypatch, piped(), images)
    assert (found.call_size, found.bound, found.images) == (calls, "memory", 12)


def test_a_gradient_of_a_whole_group_does_not_bound_the_other_calls(piped, monkeypatch):
    pipe = piped(batch=48)
    needs = make_plan(pipe, pipe.config).needs
    fitting = with_memory(monkeypatch, pipe, 13)
    least = min((needs["gradient"].bytes(13) - needs[name].fixed) // needs[name].row for name in ("unet", "decode"))
    assert fitting.call_size == min(least, 48) > 13 and fitting.rows["gradient"] == 12


def test_no_tensor_has_more_elements_than_kernels_can_index(piped, monkeypatch):
    pipe = piped()
    largest = max(found.elements for found in make_plan(pipe, pipe.config).needs.values())
    monkeypatch.setattr(memory, "ELEMENT_LIMIT", 6 * largest)
    found = make_plan(pipe, pipe.config)
    assert (found.call_size, found.bound) == (6, "2^31 elements")


def test_processes_share_the_memory_of_a_cpu(piped, monkeypatch, tmp_path):
    pipe = piped()
    whole = make_plan(pipe, pipe.config).memory
    assert make_plan(pipe, pipe.config, processes=2).memory == whole // 2
    with open_run(pipe, tmp_path, 4, rank=Rank(0, 2, 0, 2)) as run:
        assert run.plan.memory == whole // 2


def test_a_method_whose_calls_are_not_known_has_the_batch_that_is_asked_for():
    found = make_plan(Tinted(), GenerateConfig.of(batch=48))
    assert (found.call_size, found.images, found.to_json()["calls"]) == (48, 48, {})


FORMS = [
    {},
    {"gradient": "unet"},
    {"refine_steps": 2, "noise_edit_steps": 1},
    {"guidance_step": 0.0, "cutmix_every": 1},
]


@pytest.mark.parametrize("settings", FORMS[1:3], ids=str)
def test_memory_is_the_same_with_and_without_data_and_nothing_random_enters(piped, monkeypatch, settings):
    pipe, state = piped(**settings), torch.get_rng_state()
    with_data = make_plan(pipe, pipe.config)
    monkeypatch.setattr(plan, "_SMALL", 0)
    without = make_plan(pipe, pipe.config)
    assert without.needs.keys() == with_data.needs.keys()
    for name, needs in with_data.needs.items():
        assert without.needs[name].row == pytest.approx(needs.row, rel=0.02), name
        assert without.needs[name].elements == needs.elements
    assert torch.equal(state, torch.get_rng_state())


MIXED = {"gradient": "unet", "guide_from": 0.25, "cfg_to": 0.75}  # guided steps of two rows, and of one
MORE = [{"batch": 6}, {"cfg_to": 0.5, "guidance_repeats": 3}, MIXED]


@pytest.mark.parametrize("settings", [*FORMS, *MORE], ids=str)
def test_predicted_calls_are_those_of_a_pass(piped, monkeypatch, settings):
    pipe = piped(**settings)
    found = make_plan(pipe, pipe.config)
    calls = {name: timing.calls for name, timing in predict(pipe, found, "png").items()}
    rows, images, gradients = [], [], []
    denoise, decode, of_call = GuidedPipeline.denoise, GuidedPipeline.decode, Guidance.of_call
    monkeypatch.setattr(GuidedPipeline, "denoise", lambda own, z, *a: (rows.append(len(z)), denoise(own, z, *a))[1])
    monkeypatch.setattr(GuidedPipeline, "decode", lambda own, z: (images.append(len(z)), decode(own, z))[1])
    monkeypatch.setattr(Guidance, "of_call", lambda own, z, *a: (gradients.append(len(z)), of_call(own, z, *a))[1])
    pipe.call_size = found.call_size
    pipe(range(found.images))
    assert calls.pop("write") == found.images and images == [found.rows["decode"]] * int(calls.pop("decode"))
    unet = calls.pop("unet")
    if settings.get("gradient") != "unet" and not settings.get("noise_edit_steps"):  # a gradient has its own UNet calls
        assert sum(rows) == unet * found.rows["unet"] * (1 + pipe.uses_cfg)
    assert len(gradients) == sum(calls.values()) and set(gradients) <= {min(12, found.call_size)}


@pytest.mark.parametrize(
    "settings",
    [*FORMS, *MORE, {**MIXED, "batch": 5}, {"reencode": 1, "refine_steps": 1}, {"cutmix_every": 2, "cutmix_repair": 2}],
    ids=str,
)
def test_flop_of_a_trajectory_are_those_of_the_calls_that_are_made(piped, settings):
    """With and without the pass for a group's statistics; a finished image is shown to the teacher once more."""
    pipe = piped(**settings)
    pack, look = pipe.pack(torch.arange(12), 0), counted(pipe.teacher.logits, torch.rand(12, 3, 16, 16))[1]
    with memory._Live() as live:
        pipe.finished(pack)
    assert 12 * plan.flop_of_trajectory(pipe, plan.needs_of(pipe)) == live.flop - look


def test_a_plan_tells_the_flop_of_a_group_in_several_calls(piped, monkeypatch):
    whole, cut = (make_plan(pipe, pipe.config).needs for pipe in (piped(), piped(batch=6)))
    judging = counted(classifier(size=16).logits, torch.rand(1, 3, 16, 16))[1]
    assert cut["gradient"].flop == whole["gradient"].flop + whole["decode"].flop + judging
    assert {**cut, "gradient": whole["gradient"]} == whole


def test_seconds_of_an_engine_are_those_of_its_building(piped, monkeypatch):
    pipe = piped()
    found = make_plan(pipe, pipe.config)
    pipe.choices = (SimpleNamespace(network="unet", key="u"), SimpleNamespace(network="decode", key=None))
    facts = {"milliseconds": {"engine": 30.0, "rows": 12}}
    store = SimpleNamespace(get=lambda key: SimpleNamespace(facts=facts) if key == "u" else None)
    monkeypatch.setattr(plan, "EngineStore", lambda root: store)
    timings = predict(pipe, found, "png")
    assert timings["unet"].seconds == pytest.approx(0.03 * 48 / 12)  # 24 images of two rows
    assert timings["unet"].source == "engine, when it was built" and timings["decode"].source == "tried with 24"
    assert plan.seconds_of(found, timings, 25) == pytest.approx(2 * plan.seconds_of(found, timings, 24))


@pytest.mark.parametrize("fits, tried", [(12, [40, 20, 10, 10]), (100, [40, 40]), (0, [40, 20, 10, 5, 2, 1])])
def test_a_trial_that_is_short_of_memory_is_halved_and_ends_no_run(monkeypatch, fits, tried):
    seen = []

    def call(rows):
        seen.append(rows)
        if rows > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(plan, "network_calls", lambda pipe, batch, images: {"unet": call})
    _, rows = plan._tried(SimpleNamespace(device=CPU), "unet", 40, 1)
    assert seen == tried and rows == (tried[-1] if fits else 0)
