"""The step table against diffusers' own schedulers, step by step, and against an exact solution."""

import math

import diffusers
import pytest
import torch

from dfkd import config as settings
from dfkd.errors import UsageError
from dfkd.synthesis.schedule import PREDICTION_TYPES, SAMPLERS, build_table

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
    "dpmpp2m": "DPMSolverMultistepScheduler",
}


def reference(config, sampler, steps):
    """The diffusers scheduler that the table replaces, its tables in float64 so that only step()'s own casts remain."""
    scheduler = getattr(diffusers, CLASSES[sampler]).from_config({**config, **FORCED.get(sampler, {})})
    if hasattr(scheduler.config, "clip_sample"):
        scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(steps)
    for name in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def ours(table, i, z, m, z0_before, noise):
    z0 = table.z0_z[i] * z + table.z0_model[i] * m
    stepped = table.step_z[i] * z + table.step_model[i] * m + table.step_prev[i] * z0_before
    return stepped + table.step_noise[i] * noise, z0


def theirs(scheduler, sampler, i, z, m, noise, monkeypatch):
    """One diffusers step on latents in VP form, with this noise where the sampler asks for some."""
    t = scheduler.timesteps[i]
    if sampler == "ddpm":
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: noise)
        return scheduler.step(m, t, z).prev_sample
    if sampler != "euler":
        return scheduler.step(m, t, z).prev_sample
    scale, next_scale = (torch.sqrt(1 + scheduler.sigmas[j] ** 2) for j in (i, i + 1))
    torch.testing.assert_close(scheduler.scale_model_input(z * scale, t), z)  # the network sees the VP latents
    return scheduler.step(m, t, z * scale).prev_sample / next_scale


def compare_along(config, sampler, steps, monkeypatch):
    """Walk a trajectory of random network outputs; both sides start every step from the same latents."""
    table, scheduler = build_table(config, sampler, steps), reference(config, sampler, steps)
    assert len(table) == steps
    torch.testing.assert_close(table.timesteps, scheduler.timesteps[:steps].double(), rtol=0, atol=0)
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)  # noqa: E731
    z, z0 = draw() * table.init_scale, torch.zeros(2, 4, 3, 3, dtype=torch.float64)
    for i in range(steps):
        m, noise = draw(), draw()
        expected = theirs(scheduler, sampler, i, z, m, noise, monkeypatch)
        z, z0 = ours(table, i, z, m, z0, noise)
        # 1e-6: euler and dpmpp2m cast the latents to float32 inside step() (6e-8 relative), and an epsilon or sample
        # prediction of random numbers has large terms that cancel at high noise. ddpm and ddim stay in float64, but
        # diffusers raises a variance of zero (ddpm's last step) to 1e-20, a noise of 1e-10.
        tolerance = 1e-9 if sampler in ("ddpm", "ddim") else 1e-6
        scale = max(1.0, float(z0.abs().max()), float(z.abs().max()))
        torch.testing.assert_close(z, expected, rtol=0, atol=tolerance * scale, msg=lambda m, i=i: f"step {i}: {m}")


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 20])  # 7 does not divide 1000; dpmpp2m ends differently from 15 steps on
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_is_diffusers(sampler, prediction, steps, spacing, monkeypatch):
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
        ("dpmpp2m", {"use_karras_sigmas": True}),
        ("dpmpp2m", {"final_sigmas_type": "sigma_min"}),  # 20 steps: the last one stays of second order
        ("dpmpp2m", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
        ("dpmpp2m", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),  # the sampler's name wins
    ],
)
def test_config_options(sampler, change, monkeypatch):
    compare_along({**SD15, **change}, sampler, 20, monkeypatch)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_terminal_snr(sampler, prediction, monkeypatch):
    config = {**SD15, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": prediction}
    table = build_table(config, sampler, 20)
    assert table.alpha[0] < 1e-3  # diffusers keeps 2^-12 for euler and dpmpp2m, whose noise ratio must be finite
    if sampler in ("ddpm", "ddim"):
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
        ({}, "plms", 10, "unknown sampler 'plms': known are ddpm, ddim, euler, dpmpp2m, or FILE.py:NAME"),
        ({}, "ddim", 0, "steps 0: want 1 to 1000"),
        ({}, "ddim", 1001, "steps 1001: want 1 to 1000"),
        ({}, "ddim", 1000, "steps_offset 1 and leading spacing"),
        ({"timestep_spacing": "leading"}, "dpmpp2m", 1000, "repeats a noise level"),
        ({"timestep_spacing": "backwards"}, "ddim", 10, "backwards"),
        ({"beta_schedule": "steep"}, "ddim", 10, "steep"),
        ({"clip_sample": True}, "ddim", 10, "clip_sample is on"),
        ({"thresholding": True}, "euler", 10, "thresholding is on"),
        ({"variance_type": "fixed_small_log"}, "ddpm", 10, "variance_type 'fixed_small_log'"),
        ({"variance_type": "learned_range"}, "euler", 10, "variance_type 'learned_range'"),
        ({"prediction_type": "flow_prediction"}, "euler", 10, "prediction_type 'flow_prediction'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "euler", 10, "FlowMatchEulerDiscreteScheduler: not a"),
        ({"_class_name": "EDMEulerScheduler"}, "euler", 10, "EDMEulerScheduler: not a"),
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
    with pytest.raises(UsageError, match="clip_sample is on"):
        build_table({**config, "_class_name": "DDIMScheduler"}, "ddim", 10)
