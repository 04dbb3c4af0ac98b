"""The step table against diffusers' own schedulers, step by step, and against an exact solution."""

import math

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from dfkd import config as settings
from dfkd.errors import UsageError
from dfkd.synthesis.sampler import sample, sample_through_unet
from dfkd.synthesis.schedule import SAMPLERS, build_table
from dfkd.synthesis.scheduler_config import _ENTRIES, FLOW_CLASSES, PREDICTION_TYPES
from dfkd_kernels.philox import philox_normal
from tests.properties import given, st
from tests.properties import settings as hypothesis_settings

SD15 = {  # scheduler/scheduler_config.json of Stable Diffusion 1.5
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
FORCED = {"dpmpp2m": {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}}
CLASSES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp2m": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}
FLOW = {  # scheduler/scheduler_config.json of Stable Diffusion 3
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.29.0.dev0",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}


def reference(config, sampler, steps, clip=False, tokens=None):
    """The diffusers scheduler that the table replaces, its tables in float64 so that only step()'s own casts remain."""
    flow = config.get("_class_name") == FLOW["_class_name"]
    name = config["_class_name"] if flow else CLASSES[sampler]
    scheduler = getattr(diffusers, name).from_config({**config, **FORCED.get(sampler, {})})
    if hasattr(scheduler.config, "clip_sample"):
        scheduler.register_to_config(clip_sample=clip)
    scheduler.set_timesteps(steps, **({} if tokens is None else {"mu": calculate_shift(tokens)}))
    for name in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def ours(table, i, z, m, z0_before, noise):
    z0 = table.z0_z[i] * z + table.z0_model[i] * m
    stepped = table.step_z[i] * z + table.step_model[i] * m + table.step_prev[i] * z0_before
    return stepped + table.step_noise[i] * noise, z0


def theirs(scheduler, i, z, m, noise, monkeypatch):
    """One diffusers step on latents as ours are, with this noise where the sampler asks for some."""
    t, module = scheduler.timesteps[i], type(scheduler).__module__
    t = t if t.is_floating_point() else int(t)  # of a tensor, LCM would compute its scalings in float32
    if hasattr(__import__(module, fromlist=["_"]), "randn_tensor"):
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *a, **k: noise)
    if "Euler" not in type(scheduler).__name__ or "Flow" in type(scheduler).__name__:
        return scheduler.step(m, t, z).prev_sample
    scale, next_scale = (torch.sqrt(1 + scheduler.sigmas[j] ** 2) for j in (i, i + 1))
    torch.testing.assert_close(scheduler.scale_model_input(z * scale, t), z)  # the network sees the VP latents
    return scheduler.step(m, t, z * scale).prev_sample / next_scale


def compare_along(config, sampler, steps, monkeypatch, **image):
    """Walk a trajectory of random network outputs; both sides start every step from the same latents."""
    table, scheduler = build_table(config, sampler, steps, **image), reference(config, sampler, steps, **image)
    assert len(table) == steps
    torch.testing.assert_close(table.timesteps, scheduler.timesteps[:steps].double(), rtol=0, atol=0)
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)  # noqa: E731
    z, z0 = draw() * table.init_scale, torch.zeros(2, 4, 3, 3, dtype=torch.float64)
    for i in range(steps):
        m, noise = draw(), draw()
        expected = theirs(scheduler, i, z, m, noise, monkeypatch)
        z, z0 = ours(table, i, z, m, z0, noise)
        # 1e-6: the Euler classes and dpmpp2m cast the latents to float32 inside step() (6e-8 relative), and an epsilon
        # or sample prediction of random numbers has large terms that cancel at high noise. The others stay in float64,
        # but diffusers raises a variance of zero (ddpm's last step) to 1e-20, a noise of 1e-10.
        tolerance = 1e-9 if sampler in ("ddpm", "ddim", "lcm") and "shift" not in config else 1e-6
        scale = max(1.0, float(z0.abs().max()), float(z.abs().max()))
        torch.testing.assert_close(z, expected, rtol=0, atol=tolerance * scale, msg=lambda m, i=i: f"step {i}: {m}")


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 20])  # 7 does not divide 1000; dpmpp2m ends differently from 15 steps on
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_is_diffusers(sampler, prediction, steps, spacing, monkeypatch):
    if (sampler, prediction) == ("euler-ancestral", "sample"):
        pytest.skip("diffusers' class has no sample prediction")
    config = {**SD15, "prediction_type": prediction, "timestep_spacing": spacing}
    compare_along(config, sampler, steps, monkeypatch)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stable_diffusion_config_as_it_is(sampler, monkeypatch):
    compare_along(SD15, sampler, 50, monkeypatch)


@pytest.mark.parametrize(
    "sampler, change",
    [
        ("ddpm", {"variance_type": "fixed_large"}),
        ("ddpm", {"steps_offset": 0}),  # ends at timestep 0, where no noise is added
        ("ddim", {"set_alpha_to_one": True}),
        ("ddim", {"steps_offset": 0}),
        ("ddim", {"beta_schedule": "squaredcos_cap_v2"}),
        ("euler", {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading"}),
        ("euler", {"use_karras_sigmas": True}),
        ("euler", {"prediction_type": "v_prediction", "timestep_type": "continuous"}),
        ("ddpm", {"variance_type": "fixed_small_log"}),  # diffusers computes fixed_small by way of a logarithm
        ("euler-ancestral", {"timestep_spacing": "trailing"}),  # SDXL-Turbo's
        ("euler-ancestral", {"steps_offset": 0, "variance_type": "fixed_large"}),  # of another class: not its option
        ("lcm", {"original_inference_steps": 100, "timestep_scaling": 3.0}),
        ("dpmpp2m", {"use_karras_sigmas": True}),
        ("dpmpp2m", {"final_sigmas_type": "sigma_min"}),  # 20 steps: the last one stays of second order
        ("dpmpp2m", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
        ("dpmpp2m", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),  # the sampler's name wins
    ],
)
def test_config_options(sampler, change, monkeypatch):
    compare_along({**SD15, **change}, sampler, 20, monkeypatch)


@pytest.mark.parametrize("steps", range(1, 9))
def test_lcm_in_few_steps(steps, monkeypatch):
    compare_along(SD15, "lcm", steps, monkeypatch)
    table = build_table(SD15, "lcm", steps)
    assert (table.step_noise != 0).tolist() == [True] * (steps - 1) + [False]  # none in the last


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("steps", [1, 7, 28])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"shift": 1.0},
        {"shift_terminal": 0.02},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"stochastic_sampling": True},
        {"prediction_type": "flow_prediction"},
    ],
)
def test_rectified_flow(sampler, steps, change, monkeypatch):
    if steps == 1 and change.keys() & {"shift_terminal", "use_karras_sigmas", "use_exponential_sigmas"}:
        pytest.skip("diffusers divides by the number of steps less one")
    compare_along({**FLOW, **change}, sampler, steps, monkeypatch)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [64, 1024, 4096])
def test_dynamic_shift_follows_the_image(tokens, kind, monkeypatch):
    config = {**FLOW, "use_dynamic_shifting": True, "time_shift_type": kind}
    compare_along(config, "euler", 10, monkeypatch, tokens=tokens)


def test_flow_levels_are_those_of_straight_lines():
    table = build_table(FLOW, "euler", 10)
    torch.testing.assert_close(table.alpha, 1 - table.sigma)
    assert table.init_scale == 1 and table.sigma[0] == 1
    torch.testing.assert_close(table.step_z0[:-1], table.alpha[1:])  # guidance with n held


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_terminal_snr(sampler, prediction, monkeypatch):
    config = {**SD15, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": prediction}
    table = build_table(config, sampler, 20)
    assert table.alpha[0] < 1e-3  # diffusers keeps 2^-12 for the classes whose noise ratio must be finite
    if sampler in ("ddpm", "ddim", "lcm"):
        compare_along(config, sampler, 20, monkeypatch)
    else:  # at a ratio of 4096 the float32 latents inside step() lose what float64 keeps; the values stay finite
        assert all(torch.isfinite(getattr(table, name)).all() for name in ("z0_z", "step_z", "step_model", "step_prev"))


def test_trailing_spacing_drops_the_rounding_timestep(monkeypatch):
    """diffusers makes 62 timesteps of 61, the last one -1."""
    compare_along({**SD15, "timestep_spacing": "trailing"}, "ddpm", 61, monkeypatch)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_coefficient(sampler, prediction):
    """Moving (z, z0hat) by (alpha d, d) leaves eps alone and moves z' by step_z0 d."""
    table = build_table({**SD15, "prediction_type": prediction}, sampler, 10)
    z, m, z0_before, noise, d = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for i in range(10):
        alpha, sigma = table.alpha[i], table.sigma[i]
        # The same eps at the moved latents means another output of the network, by its prediction type.
        moved = {"epsilon": m, "v_prediction": m - sigma * d, "sample": m + d}[prediction]
        after, z0 = ours(table, i, z, m, z0_before, noise)
        after_moved, z0_moved = ours(table, i, z + alpha * d, moved, z0_before, noise)
        torch.testing.assert_close(z0_moved, z0 + d)
        torch.testing.assert_close(after_moved, after + table.step_z0[i] * d)


def gaussian_error(sampler, steps, std=0.5, T=2048):
    """Distance to the exact probability-flow solution for data N(0, std^2), before the last step.

    There z / sqrt(alpha^2 std^2 + sigma^2) is constant along a trajectory. Log-SNR falls evenly over the T timesteps,
    so that steps are of one size and an order shows.
    """
    lam = torch.linspace(2.5, -2.5, T, dtype=torch.float64)
    abar = torch.sigmoid(2 * lam)
    betas = 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    config = {
        "num_train_timesteps": T,
        "trained_betas": betas.tolist(),
        "timestep_spacing": "leading",
        "steps_offset": 0,
    }
    table = build_table(config, sampler, steps)
    spread = torch.sqrt(table.alpha**2 * std**2 + table.sigma**2)
    z = z0 = spread[0]
    for i in range(steps - 1):
        z, z0 = ours(table, i, z, table.sigma[i] * z / spread[i] ** 2, z0, 0.0)  # eps = -sigma score
    return abs(float(z / spread[-1]) - 1)


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("euler", 1), ("dpmpp2m", 2)])
def test_order_of_convergence(sampler, order):
    # steps + 1 = 2^k: every spacing then has a whole number of timesteps a step
    assert abs(math.log2(gaussian_error(sampler, 63) / gaussian_error(sampler, 127)) - order) < 0.15


def test_ddpm_keeps_the_variance():
    """For data N(0, 1) the exact eps is sigma z and every marginal has variance one, up to what the steps leave out."""
    table = build_table(SD15, "ddpm", 1000 // 2)
    variance = 1.0
    for i in range(len(table)):
        gain = table.step_z[i] + table.step_model[i] * table.sigma[i]
        variance = gain**2 * variance + table.step_noise[i] ** 2
    assert abs(variance - 1) < 0.02


@pytest.mark.parametrize(
    "change, sampler, steps, message",
    [
        ({}, "plms", 10, f"unknown sampler 'plms': known are {', '.join(SAMPLERS)}, or FILE.py:NAME"),
        ({}, "ddim", 0, "steps 0: want 1 to 1000"),
        ({}, "ddim", 1001, "steps 1001: want 1 to 1000"),
        ({}, "ddim", 1000, "steps_offset 1 and leading spacing"),
        ({"timestep_spacing": "leading"}, "dpmpp2m", 1000, "repeats a noise level"),
        ({}, "lcm", 51, "is smaller than `num_inference_steps`: 51"),
        ({"clip_sample": True}, "ddim", 10, "clip_sample is on: it bounds pixel values"),
        ({"thresholding": True}, "euler", 10, "thresholding = True"),
        ({"variance_type": "fixed_large_log"}, "ddpm", 10, "variance_type 'fixed_large_log'"),
        ({"variance_type": "learned_range"}, "ddpm", 10, "variance_type 'learned_range' with ddpm"),
        ({"prediction_type": "flow_prediction"}, "euler", 10, "prediction_type is 'flow_prediction'"),
        ({**FLOW}, "dpmpp2m", 10, "sampler dpmpp2m on rectified flow: it has no such step. use ddim or euler"),
        ({**FLOW}, "ddpm", 10, "sampler ddpm on rectified flow"),
        ({**FLOW, "use_dynamic_shifting": True}, "euler", 10, "use_dynamic_shifting is on"),
        ({**FLOW, "invert_sigmas": True}, "euler", 10, "invert_sigmas = True"),
        ({**FLOW, "prediction_type": "epsilon"}, "euler", 10, "prediction_type is 'epsilon'"),
        ({"_class_name": "EDMEulerScheduler"}, "euler", 10, "EDMEulerScheduler: neither a"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "lcm", 10, "CMStochasticIterativeScheduler: neither a"),
        ({"_class_name": "CogVideoXDDIMScheduler"}, "ddim", 10, "CogVideoXDDIMScheduler: neither a"),
        ({"use_karras_sigmas": True}, "ddim", 10, "use_karras_sigmas = True: sampler ddim has no such option"),
        ({"use_flow_sigmas": True}, "dpmpp2m", 10, "use_flow_sigmas"),
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "ddim", 10, "has no signal"),
    ],
)
def test_refusals(change, sampler, steps, message):
    with pytest.raises(UsageError) as caught:
        build_table({**SD15, **change}, sampler, steps)
    assert message in str(caught.value)


def test_every_sampler_that_the_settings_name_is_there():
    assert tuple(SAMPLERS) == settings.SAMPLERS


def test_coefficients_are_rows_for_the_kernel():
    table, like = build_table(SD15, "dpmpp2m", 3), torch.zeros(1)
    rows = table.coefficients(like, cfg=2.5)
    assert rows.shape == (3, 8) and rows.dtype == torch.float32 and rows[:, 7].tolist() == [2.5] * 3
    torch.testing.assert_close(rows[1].double()[:2], torch.stack([table.z0_z[1], table.z0_model[1]]))


def test_clipping_by_the_default_of_the_named_class_is_refused():
    config = {k: v for k, v in SD15.items() if k != "clip_sample"}
    build_table(config, "ddpm", 10)  # PNDM has no clipping
    for name in ("DDIMScheduler", "DDPMParallelScheduler"):
        with pytest.raises(UsageError, match="clip_sample is on"):
            build_table({**config, "_class_name": name}, "ddim", 10)
    build_table({**config, "_class_name": "LCMScheduler"}, "ddim", 10)  # LCM has, and leaves it off


PIXELS = {  # scheduler_config.json of google/ddpm-cifar10-32, whose DDPM clips
    "_class_name": "DDPMScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "variance_type": "fixed_large",
}


@pytest.mark.parametrize("loop", [sample, sample_through_unet])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("limit", [1.0, 0.4])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "lcm"])
def test_clipping_of_pixels_is_diffusers(sampler, limit, prediction, loop, monkeypatch):
    config = {**PIXELS, "clip_sample_range": limit, "prediction_type": prediction}
    table, scheduler = build_table(config, sampler, 8, pixels=True), reference(config, sampler, 8, clip=True)
    ids, generator = torch.arange(2), torch.Generator().manual_seed(0)
    z, *outputs = torch.randn(9, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    expected, along = [z], []
    for i in range(8):
        noise = philox_normal(5, ids, i, (3, 4, 4), torch.float64)
        expected.append(theirs(scheduler, i, expected[-1], outputs[i], noise, monkeypatch))

    def denoise(z, i, images=None):
        return outputs[i][None]

    loop(z, table.coefficients(z), denoise, None, repeats=lambda i: 0, clip=table.clip,
         noise=lambda i: (5, ids, i), after=lambda i, z, z0: (along.append((z, z0)), (z, z0))[1])  # fmt: skip
    free = loop(z, table.coefficients(z), denoise, None, repeats=lambda i: 0, noise=lambda i: (5, ids, i))
    assert (free - along[-1][0]).abs().max() > 0.1  # the clamp acts
    for (mine, estimate), wanted in zip(along, expected[1:], strict=True):
        # float64; an epsilon prediction has terms of 1/alpha = 100 that cancel, and ddpm's variance is at least 1e-20
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-9)
        assert estimate.abs().max() <= limit + 1e-12


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "lcm"])
def test_guidance_stays_within_the_pixels_and_holds_eps(sampler):
    """A push towards 9 ends at the bound; the step is the one of an estimate there with the unguided step's eps."""
    table = build_table(PIXELS, sampler, 4, pixels=True)
    generator = torch.Generator().manual_seed(0)
    z, m = 0.02 * torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    rows, estimates = table.coefficients(z), []

    def keep(i, z, z0):
        estimates.append(z0)
        return z, z0

    def run(guide):
        denoise = lambda z, i: m[None]  # noqa: E731
        return sample(z, rows[2:3], denoise, guide, repeats=lambda i: 2, clip=table.clip, after=keep)

    plain, pushed = run(lambda point, i: torch.zeros_like(point)), run(lambda point, i: point - 9)
    estimate, bound = estimates
    assert estimate.abs().max() < 1
    torch.testing.assert_close(bound, torch.ones_like(bound))
    torch.testing.assert_close(pushed, plain + table.step_z0[2] * (bound - estimate))


@pytest.mark.parametrize("sampler", ["euler", "euler-ancestral", "dpmpp2m"])
def test_samplers_whose_class_does_not_clip_refuse_to(sampler):
    with pytest.raises(UsageError, match=f"clip_sample is on: sampler {sampler} has no such option. use ddpm or ddim"):
        build_table(PIXELS, sampler, 10, pixels=True)
    assert build_table({**PIXELS, "clip_sample": False}, sampler, 10, pixels=True).clip is None


@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - {"ddpm"}))
def test_a_learned_variance_matters_to_ddpm_alone(sampler):
    config = {**SD15, "variance_type": "learned_range"}
    assert torch.equal(build_table(config, sampler, 10).step_model, build_table(SD15, sampler, 10).step_model)


SIBLINGS = [
    "DDIMParallelScheduler", "DDPMParallelScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler",
    "UniPCMultistepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "HeunDiscreteScheduler",
    "LMSDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler", "SASolverScheduler",
    "DPMSolverSDEScheduler", "PNDMScheduler",
]  # fmt: skip


@pytest.mark.parametrize(
    "name", [*SIBLINGS, "FlaxDDIMScheduler", "FlaxPNDMScheduler", "FlaxDPMSolverMultistepScheduler"]
)
def test_configs_of_one_kind_make_one_table(name):
    for sampler in SAMPLERS:
        named, plain = build_table({**SD15, "_class_name": name}, sampler, 5), build_table(SD15, sampler, 5)
        assert torch.equal(named.timesteps, plain.timesteps) and torch.equal(named.step_model, plain.step_model)


@pytest.mark.parametrize("name", FLOW_CLASSES)
def test_classes_of_rectified_flow(name):
    table = build_table({**FLOW, "_class_name": name}, "euler", 5)
    assert torch.equal(table.sigma, build_table(FLOW, "ddim", 5).sigma)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_train_timesteps": None}, "num_train_timesteps is None: want a whole number from 1 to 1000000"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps is 1000.0"),
        ({"num_train_timesteps": True}, "num_train_timesteps is True"),
        ({"beta_start": 0.02}, "beta_start is 0.02: want at most beta_end, which is 0.012"),
        ({"beta_start": -0.1}, "beta_start is -0.1: want a number between 0 and 1"),
        ({"beta_end": "0.012"}, "beta_end is '0.012'"),
        ({"beta_end": math.nan}, "beta_end is nan"),
        ({"beta_schedule": "steep"}, "beta_schedule is 'steep': want one of linear, scaled_linear"),
        ({"beta_schedule": None}, "beta_schedule is None"),
        ({"beta_schedule": "sigmoid"}, "sigmoid is not implemented"),  # ddpm's alone
        ({"trained_betas": [0.1] * 10}, "want 1000 of them, one for each of num_train_timesteps"),
        ({"trained_betas": "many"}, "trained_betas is 'many'"),
        ({"trained_betas": [0.1, "x"]}, "trained_betas is [0.1, 'x']"),
        ({"trained_betas": [2.0] * 1000}, "want null, or a list of numbers between 0 and 1"),
        ({"timestep_spacing": "backwards"}, "timestep_spacing is 'backwards': want one of leading, trailing, linspace"),
        ({"steps_offset": 1.5}, "steps_offset is 1.5"),
        ({"set_alpha_to_one": "no"}, "set_alpha_to_one is 'no': want true or false"),
        ({"prediction_type": None}, "prediction_type is None"),
        ({"_class_name": 3}, "_class_name is 3"),
        ({**FLOW, "shift": 0}, "shift is 0: want a number above 0"),
        ({**FLOW, "shift": None}, "shift is None"),
        ({**FLOW, "time_shift_type": "cubic"}, "time_shift_type is 'cubic'"),
        ({**FLOW, "use_dynamic_shifting": True, "max_image_seq_len": 256}, "base_image_seq_len is 256"),
    ],
)
def test_malformed_configs_are_named_with_their_value(change, message):
    with pytest.raises(UsageError) as caught:
        build_table({**SD15, **change}, "ddim", 10, tokens=64)
    assert message in str(caught.value) and caught.value.todo


ODD = [
    None,
    True,
    "",
    "x",
    "linear",
    0,
    1,
    -1,
    3,
    1.5,
    1e-9,
    1e30,
    10**400,
    math.nan,
    math.inf,
    -math.inf,
    [],
    [0.5],
    {},
]


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    base=st.sampled_from([SD15, FLOW]),
    changes=st.dictionaries(st.sampled_from(sorted({*_ENTRIES, "_class_name"})), st.sampled_from(ODD), max_size=2),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    steps=st.sampled_from([1, 2, 10]),
    pixels=st.booleans(),
)
@pytest.mark.filterwarnings("ignore")
def test_a_config_is_refused_in_words_or_makes_a_finite_table(base, changes, sampler, steps, pixels):
    try:
        table = build_table({**base, **changes}, sampler, steps, pixels=pixels, tokens=64)
    except UsageError as error:
        assert error.what and error.why and error.todo
    else:
        assert table.coefficients(torch.zeros(1)).isfinite().all() and len(table) == steps


@pytest.mark.parametrize("key", sorted(_ENTRIES))
def test_every_entry_has_its_values_checked(key):
    """A dict is the value of none: whichever class reads the entry names it."""
    readers = [(base, name) for base in (SD15, FLOW) for name in SAMPLERS]
    found = []
    for base, sampler in readers:
        try:
            build_table({**base, key: {"a": 1}}, sampler, 5, pixels=True, tokens=64)
        except UsageError as error:
            found.append(str(error))
    assert any(f"{key} is {{'a': 1}}: want" in text for text in found)
