"""Rows of every call: within each limit, in as few calls as they allow, and what the sampler then really calls."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dfkd.cli.generate_options import GenerateOptions
from dfkd.compiled.requests import CALL_UNIT
from dfkd.synthesis.planning.plan import elements_of, plan_of
from dfkd.synthesis.guidance import Guidance, LossWeights
from dfkd.synthesis.run import Synthesis
from dfkd.synthesis.sampler import SamplerSettings
from dfkd.synthesis.schedule import build_table
from dfkd_engine.planner import ELEMENT_LIMIT, Footprint, halved, plan_calls, shared
from tests.sd15_sizes import SD15, SD15_VAE, TINY
from tests.synthesis.small_networks import SCHEDULER, SmallPrior, classifier

GIB = 2**30
SD15_BYTES = {  # counted in half precision at 512x512, of an image; of the UNet with two rows
    "unet": Footprint(0, GIB // 2, 0),
    "decode": Footprint(0, GIB, 0),
    "gradient": Footprint(0, 3 * GIB, 0),
}


def options_with(**values) -> GenerateOptions:
    return GenerateOptions(out=".", **values)


def planned(options, memory=0, size=64, copies=2, vae=SD15_VAE, unet=SD15, remembered=(), needs=SD15_BYTES):
    through_unet = options.gradient == "unet" or options.noise_edit_steps > 0
    counted = elements_of(unet, vae, (size, size), copies, through_unet)
    needs = {name: replace(found, elements=counted[name]) for name, found in needs.items()}
    return plan_of(options, needs, copies, GIB, memory, memory, dict(remembered)), counted


def test_stable_diffusion_at_512_without_a_limit_of_memory():
    """31 images a call of the decoder, 204 rows, 102 images, a call of the UNet: multiples of 16 below."""
    plan, _ = planned(options_with(batch=512, group=512))
    assert {name: (call.rows, call.calls, call.bound) for name, call in plan.calls.items()} == {
        "unet": (96, 6, "elements"), "decode": (16, 32, "elements"), "gradient": (16, 32, "elements")
    }  # fmt: skip
    assert plan.rows.unet * plan.copies == 192
    plan, _ = planned(options_with(batch=512, group=204), copies=1)
    assert plan.rows.unet == 204 and plan.calls["unet"].bound == "group"
    plan, _ = planned(options_with(batch=512, group=205), copies=1)
    assert plan.rows.unet == 112  # two calls, 19 rows of filling


sizes = st.integers(1, 256)
OPTIONS = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2000),
        "micro_batch": st.integers(0, 2000),
        "group": st.integers(1, 2000),
        "gradient": st.sampled_from(["latent", "unet"]),
        "bn_stats": st.sampled_from(["image", "group"]),
        "bn_weight": st.sampled_from([0.0, 1.0]),
        "noise_edit_steps": st.integers(0, 1),
        "refine_steps": st.integers(0, 1),
    }
)
LIMITS = st.dictionaries(st.sampled_from(["unet", "decode", "gradient"]), st.integers(1, 2000))


@settings(max_examples=400, deadline=None)
@given(
    OPTIONS, sizes, st.integers(1, 2), st.sampled_from([SD15_VAE, TINY]), st.sampled_from([0, 10, 80]), LIMITS,
    st.sampled_from([SD15, SD15 | {"block_out_channels": (32, 64, 1280, 1280)}]),
)  # fmt: skip
@example({"batch": 512, "group": 512, "gradient": "unet"}, 64, 2, SD15_VAE, 0, {}, SD15)
def test_no_limit_is_ever_exceeded(values, size, copies, vae, gib, remembered, unet):
    options = options_with(**values)
    plan, counted = planned(options, gib * GIB, size, copies, vae, unet, remembered)
    for name, call in plan.calls.items():
        limit = ELEMENT_LIMIT // counted[name]
        if size == 64 and vae is SD15_VAE and unet is SD15:
            through_unet = name == "gradient" and (options.gradient == "unet" or options.noise_edit_steps)
            assert call.rows <= (204 // copies if name == "unet" else 31)
            assert not through_unet or call.rows * copies <= 204
        assert 1 <= call.rows <= max(limit, 1) and call.rows <= options.group
        assert call.rows <= remembered.get(name, call.rows)
        assert not options.micro_batch or call.rows <= options.micro_batch
        assert call.rows == 1 or not gib or SD15_BYTES[name].bytes(call.rows) <= (gib - 1) * GIB
        whole = name == "gradient" and options.bn_weight and options.bn_stats == "group"
        whole = whole and options.gradient == "latent" and not options.micro_batch
        assert whole or call.rows <= max(options.batch, CALL_UNIT)
        # images keep their bits on a CPU: a whole group, a multiple, what was asked for, or what little fits
        smallest = min(
            [limit, remembered.get(name, limit), *([(gib - 1) // (SD15_BYTES[name].row / GIB)] if gib else [])]
        )
        exact = call.rows in (options.group, options.micro_batch) or not call.rows % CALL_UNIT
        assert exact or smallest < CALL_UNIT
        assert (call.calls - 1) * call.rows < options.group <= call.calls * call.rows
        assert (call.bound == "group") == (call.calls == 1)


def test_each_bound_is_named():
    def bound(network="unet", memory=0, remembered=(), **values):
        plan, _ = planned(options_with(**{"batch": 64, "group": 64, **values}), memory, 64, remembered=remembered)
        return plan.calls[network].bound, plan.calls[network].rows

    assert bound() == ("group", 64)
    assert bound(batch=32) == ("--batch", 32)
    assert bound(micro_batch=10) == ("--micro-batch", 10)  # at its word, in no multiples
    assert bound("decode") == ("elements", 16)
    assert bound("gradient", memory=31 * GIB) == ("memory", 10)  # 30 GiB beside weights, 3 an image
    assert bound("unet", remembered=[("unet", 32)]) == ("remembered", 32)
    assert bound("decode", micro_batch=31) == ("--micro-batch", 31) and bound("decode", micro_batch=32)[1] == 16
    assert bound("unet", memory=GIB) == ("memory", 1)  # one at least: the device has the last word


@pytest.mark.parametrize(
    "total, most, rows",
    [(200, 200, 200), (200, 96, 80), (64, 48, 32), (64, 31, 16), (40, 39, 32), (40, 15, 14), (10, 3, 3), (9, 1, 1)],
)
def test_calls_are_as_few_and_as_full_as_a_limit_allows(total, most, rows):
    assert shared(total, most, CALL_UNIT) == rows


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_shared_rows(total, most):
    rows, unit = shared(total, most, CALL_UNIT), CALL_UNIT if most >= CALL_UNIT else 1
    assert rows <= min(most, total) and (rows == total or rows % unit == 0)
    fewest = -(-total // (most - most % unit)) if most < total else 1
    assert -(-total // rows) <= fewest
    assert rows == total or rows <= unit or -(-total // (rows - unit)) > fewest  # no smaller call would do


def test_halving_ends_at_one():
    seen, rows = [], 200
    while rows > 1:
        rows = halved(rows, CALL_UNIT)
        seen.append(rows)
    assert seen == [96, 48, 16, 8, 4, 2, 1]
    assert halved(64, CALL_UNIT) == 32 and halved(31, CALL_UNIT) == 15


def test_what_a_plan_of_calls_says():
    plan = plan_calls(40, Footprint(7, 10, 5), {"a": 33, "b": 32}, CALL_UNIT)
    assert (plan.rows, plan.calls, plan.bytes, plan.bound) == (32, 2, 327, "b")
    assert plan_calls(40, Footprint(7, 10, 5), {}, CALL_UNIT).bytes == 407
    assert Footprint(7, 10, 5).most_rows(327) == 32 and Footprint(7, 10, 5).most_rows(3) == 0
    assert Footprint(7, 10, 5).with_(Footprint(1, 20, 4)) == Footprint(7, 20, 5)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9), st.tuples(*[st.integers(1, 9)] * 3), st.sampled_from([1.0, 3.0]),
    st.sampled_from(["latent", "unet"]), st.sampled_from(["image", "group"]), st.integers(0, 1), st.integers(1, 2),
)  # fmt: skip
def test_the_sampler_keeps_to_its_rows(group, rows, cfg, path, stats, noise_edit, repeats):
    """Every call of a network, whichever path it is on, holds the images that it was given and no more."""
    prior, teacher = SmallPrior(), classifier()
    decoded = []

    def decode(z):
        decoded.append(len(z))
        return SmallPrior.decode(prior, z)

    unet, decode_rows, gradient = (min(n, group) for n in rows)
    guidance = Guidance(decode, teacher, LossWeights(0.1, 1.0, bn_stats=stats))
    settings = SamplerSettings(
        cfg=cfg, gradient=path, noise_edit_steps=noise_edit, refine_steps=1, guidance_repeats=repeats
    )
    table, cpu = build_table(SCHEDULER, "ddim", 2), torch.device("cpu")
    synthesis = Synthesis(
        prior, teacher, guidance, table, settings, 3, (0, 1), group, "{label}", "", prior.latent_size, cpu
    )
    ends = []
    prior.decode = lambda z: (ends.append(len(z)), SmallPrior.decode(prior, z))[1]
    synthesis.sample(0, *(unet, gradient, decode_rows))
    copies = 1 + (cfg != 1)
    through_unet = path == "unet" or noise_edit
    assert {n for n, _ in prior.calls} <= {copies * unet, copies * gradient if through_unet else copies * unet}
    assert set(decoded) == {gradient} and set(ends) == {decode_rows}
