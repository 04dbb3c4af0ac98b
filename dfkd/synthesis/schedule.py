"""A diffusers scheduler's config -> a table of step coefficients.

Every step of the samplers here is linear in the latents z, the network's output m, the noise n and the previous step's
clean estimate, so a step is one row:

    z0hat = z0_z z + z0_model m
    z'    = step_z z + step_model m + step_prev z0hat_before + step_noise n

with z = alpha z0 + sigma eps, variance preserving (alpha = sqrt(abar), sigma = sqrt(1 - abar), for Euler as well) or
rectified flow (alpha = 1 - sigma), and m what the network predicts:

    epsilon       z0hat = (z - sigma m) / alpha
    v_prediction  z0hat = alpha z - sigma m               arXiv:2202.00512, appendix D
    sample        z0hat = m
    flow          z0hat = z - sigma m                     arXiv:2209.03003; m = eps - z0

From level (alpha, sigma) to (a', s'), with lambda = log(alpha / sigma) and h = lambda' - lambda:

    ddim, euler   z' = a' z0hat + s' eps                  arXiv:2010.02502 eq. 12 at eta = 0; arXiv:2206.00364 alg. 1 is
                                                          the same update in x = z / alpha; on rectified flow as well
    ddpm,         z' = posterior mean + std n             arXiv:2006.11239 eq. 7; k-diffusion's Euler ancestral is the
    euler-ancestral                                       same in x = z / alpha, between the levels of euler
    dpmpp2m       z' = s'/sigma z - a' (e^-h - 1) D       arXiv:2211.01095 alg. 2; r = h_before / h,
                  D = (1 + 1/2r) z0hat - 1/2r z0hat_before            first order in the first and the last step
    lcm           z' = a' (c_out z0hat + c_skip z) + s' n arXiv:2310.04378 alg. 3; no noise in the last step

Timesteps and noise levels are those that the diffusers class of the sampler makes of the config, as its `from_config`
would: keys that the config leaves out take that class's defaults. A schedule whose first level has no signal (zero
terminal SNR, arXiv:2305.08891) runs with every sampler where the network predicts v or the sample; euler,
euler-ancestral and dpmpp2m put alpha = 2^-12 in the place of 0, as diffusers does.

clip_sample, of a prior on pixels, is the one step that is no row: z0hat is clamped first (`Clip`).

A linear sampler of your own is a file, used as --sampler my.py:ancestral(eta=0.5):

    def ancestral(eta=1.0):
        def update(levels: Levels, config: Mapping[str, Any]) -> Update: ...
        return Sampler("DDIMScheduler", update)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dfkd.errors import UsageError
from dfkd.extension import resolve
from dfkd.synthesis.sampler import Clip
from dfkd.synthesis.scheduler_config import (
    ANCESTRAL,
    DDIM,
    DDPM,
    DPM,
    EULER,
    FLOW,
    LCM,
    check_config,
    clip_range,
    is_flow,
    prediction_of,
)
from dfkd_kernels.guided_step import COEFFICIENTS


@dataclass(frozen=True)
class Levels:
    """Where S steps lie, float64 [S] each in sampling order, noise first.

    timesteps: what the network gets as its time (whole numbers except for some Euler spacings and for rectified flow).
    alpha, sigma: before the step; next_alpha, next_sigma: the level that it leads to, where sigma may be 0.
    init_scale: the first z is that times N(0, 1).
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    next_alpha: Tensor
    next_sigma: Tensor
    init_scale: float


@dataclass(frozen=True)
class Update:
    """A step by its factors, float64 [S] each: z' = z z + z0 z0hat + prev z0hat_before + noise n.

    z0hat is the clean estimate, guided already, z0hat_before that of the step before, n is N(0, 1).
    """

    z: Tensor
    z0: Tensor
    prev: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Sampler:
    """A linear sampler.

    scheduler: name of the diffusers class whose timesteps and noise levels it takes. update: (levels, the scheduler's
    config) -> the factors of every step. forced: entries of the config that the sampler's name already says.
    flow: the update on rectified flow, with the levels of FlowMatchEulerDiscreteScheduler; None: it has none.
    clip: what its diffusers class holds while clip_sample moves z0hat, "z" or "eps"; None: it does not clip.
    """

    scheduler: str
    update: Callable[[Levels, Mapping[str, Any]], Update]
    forced: Mapping[str, Any] = field(default_factory=dict)
    flow: Callable[[Levels, Mapping[str, Any]], Update] | None = None
    clip: str | None = None


@dataclass(frozen=True)
class StepTable:
    """Coefficients of S steps, each a float64 tensor [S] on the CPU, in sampling order (noise first).

    timesteps, alpha, sigma, init_scale: as in Levels.
    z0_z, z0_model: z0hat = z0_z z + z0_model m.
    step_z, step_model, step_prev, step_noise: z' = step_z z + step_model m + step_prev z0hat_before + step_noise n.
    step_z0: dz'/dz0hat with eps held. Guidance moves z0hat by d at the same eps, hence z by alpha d, and so
        z' by step_z0 d.
    clip: the clamp of z0hat before that, of a prior on pixels; None: there is none.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    z0_z: Tensor
    z0_model: Tensor
    step_z: Tensor
    step_model: Tensor
    step_prev: Tensor
    step_noise: Tensor
    step_z0: Tensor
    init_scale: float
    clip: Clip | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    def coefficients(self, like: Tensor, cfg: float = 1.0) -> Tensor:
        """[S, 8] on the device and in the dtype of `like`: a row of guided_step.COEFFICIENTS a step, cfg in all."""
        columns = [getattr(self, name) for name in COEFFICIENTS[:-1]]
        return torch.stack([*columns, torch.full_like(self.alpha, cfg)], 1).to(like.device, like.dtype)


def build_table(
    scheduler_config: Mapping[str, Any], sampler: str, steps: int, *, pixels: bool = False, tokens: int | None = None
) -> StepTable:
    """The coefficients of `sampler` in `steps` steps for a prior with this scheduler config.

    scheduler_config: content of a diffusers scheduler_config.json, of whichever class. sampler: as `find_sampler`.
    pixels: z are images in -1..1, which clip_sample may bound. tokens: patches of the denoiser in an image, which
        use_dynamic_shifting needs.
    For ddim the level after a step is that of timestep t - T // steps, as in diffusers: the next timestep of the table
    for `leading` spacing, and one beside it for the other spacings where they do not divide T evenly.

    Raises UsageError: unknown sampler; steps the spacing cannot make; a malformed entry; a config of another family,
    one that the sampler does not honour, or a first level without signal (zero terminal SNR) where the network predicts
    epsilon.
    """
    own = find_sampler(sampler)
    flow = is_flow(scheduler_config)
    if flow and own.flow is None:
        able = " or ".join(name for name, known in SAMPLERS.items() if known.flow)
        raise UsageError(f"sampler {sampler} on rectified flow", "it has no such step", f"use {able}")
    reader = FLOW if flow else own.scheduler
    check_config(scheduler_config, sampler, reader, _samplers_of)
    _check_variance(scheduler_config, sampler)
    clipping = [name for name, known in SAMPLERS.items() if known.clip]
    bound = clip_range(scheduler_config, pixels, own.clip is not None, sampler, clipping)
    scheduler = _scheduler(scheduler_config, reader, own, sampler, steps, tokens)
    levels = _levels(scheduler, steps)
    prediction = prediction_of(scheduler_config)
    _check(levels, prediction, sampler, steps)
    update = (own.flow if flow and own.flow else own.update)(levels, scheduler.config)
    z0_z, z0_model = clean_factors(levels.alpha, levels.sigma, prediction)
    table = StepTable(
        timesteps=levels.timesteps,
        alpha=levels.alpha,
        sigma=levels.sigma,
        z0_z=z0_z,
        z0_model=z0_model,
        step_z=update.z + update.z0 * z0_z,
        step_model=update.z0 * z0_model,
        step_prev=update.prev,
        step_noise=update.noise,
        step_z0=update.z * levels.alpha + update.z0,
        init_scale=levels.init_scale,
        clip=None if bound is None else Clip(bound, holds_z=own.clip == "z"),
    )
    if not table.coefficients(torch.zeros(1, dtype=torch.float64)).isfinite().all():
        raise UsageError(
            f"{steps} steps of {sampler}", "a coefficient of the steps is not finite", "correct scheduler_config.json"
        )
    return table


def find_sampler(name: str) -> Sampler:
    """A sampler by its name in SAMPLERS, or FILE.py:NAME, a Sampler or a function that makes one. Raises UsageError."""
    found, settings = resolve(name, SAMPLERS, "sampler")
    try:
        made = found if isinstance(found, Sampler) and not settings else found(**settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"sampler {name!r}", str(error), "correct its settings") from None
    if not isinstance(made, Sampler):
        raise UsageError(f"{name!r} is no sampler", f"it gives a {type(made).__name__}", "see Sampler in schedule.py")
    return made


def _samplers_of(schedulers: Sequence[str]) -> list[str]:
    """Names of the samplers that take the levels of these diffusers classes."""
    return [name for name, known in SAMPLERS.items() if known.scheduler in schedulers]


def _check_variance(config: Mapping[str, Any], sampler: str) -> None:
    """Raise UsageError for a variance that ddpm needs and no factor can hold; the other samplers have no use of it.

    diffusers' fixed_small_log is fixed_small; its fixed_large_log takes the root of a logarithm.
    """
    variance = config.get("variance_type") or "fixed_small"
    if sampler == "ddpm" and variance not in ("fixed_small", "fixed_small_log", "fixed_large"):
        instead = " or ".join(name for name in SAMPLERS if name != "ddpm")
        raise UsageError(
            f"scheduler config: variance_type '{variance}' with ddpm",
            "it is no factor of the step: want fixed_small or fixed_large",
            f"use {instead}",
        )


def _scheduler(
    config: Mapping[str, Any], reader: str, own: Sampler, sampler: str, steps: int, tokens: int | None
) -> Any:
    """The scheduler `reader` of diffusers, set to this many steps."""
    import diffusers  # here for the reason given in scheduler_config

    T = config.get("num_train_timesteps", 1000)
    if not 1 <= steps <= T:
        raise UsageError(f"steps {steps}", f"want 1 to {T}, the prior's number of training timesteps")
    shift = {}
    if reader == FLOW and config.get("use_dynamic_shifting"):
        shift = {"mu": _dynamic_shift(config, tokens)}
    try:
        scheduler = getattr(diffusers, reader).from_config({**config, **own.forced})
        scheduler.set_timesteps(steps, **shift)
    except Exception as error:  # whatever a foreign class finds wrong with entries that fit one by one
        why = " ".join(str(error).split()) or type(error).__name__
        todo = "take other steps, or correct scheduler_config.json"
        raise UsageError(f"scheduler config with sampler {sampler} and {steps} steps", why, todo) from error
    return scheduler


def _dynamic_shift(config: Mapping[str, Any], tokens: int | None) -> float:
    """mu of use_dynamic_shifting, linear in the number of an image's patches, as diffusers' pipelines compute it."""
    if tokens is None:
        raise UsageError(
            "scheduler config: use_dynamic_shifting is on",
            "its shift follows from the number of patches of an image, and this denoiser has none",
            'set "use_dynamic_shifting": false and a "shift" in scheduler_config.json',
        )
    short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low + (tokens - short) * (high - low) / (long - short))


def _levels(scheduler: Any, steps: int) -> Levels:
    if is_flow({"_class_name": type(scheduler).__name__}):
        sigma = scheduler.sigmas.double()
        now, then = sigma[:steps], sigma[1 : steps + 1]
        return Levels(scheduler.timesteps.double(), 1 - now, now, 1 - then, then, init_scale=1.0)
    return (_sigma_levels if hasattr(scheduler, "sigmas") else _abar_levels)(scheduler, steps)


def _abar_levels(scheduler: Any, steps: int) -> Levels:
    """Levels at whole timesteps, for the classes of ddpm, ddim and lcm."""
    abar = scheduler.alphas_cumprod.double()
    # diffusers' trailing spacing makes one timestep too many, -1, where T / steps is not exact in floating point.
    timesteps = scheduler.timesteps[:steps]
    if timesteps.max() >= len(abar) or timesteps.min() < 0:
        raise _offset_error(scheduler.config, steps)
    if type(scheduler).__name__ == DDIM:
        following, final = timesteps - len(abar) // steps, scheduler.final_alpha_cumprod.double()
    else:
        following, final = torch.cat([timesteps[1:], torch.tensor([-1])]), abar.new_tensor(1.0)
    now, then = abar[timesteps], torch.where(following >= 0, abar[following.clamp(min=0)], final)
    return Levels(timesteps.double(), now.sqrt(), (1 - now).sqrt(), then.sqrt(), (1 - then).sqrt(), init_scale=1.0)


def _sigma_levels(scheduler: Any, steps: int) -> Levels:
    """Levels by noise-to-signal ratio rho = sigma / alpha, for the classes of euler, euler-ancestral and dpmpp2m."""
    if scheduler.timesteps[:steps].max() >= scheduler.config["num_train_timesteps"]:
        raise _offset_error(scheduler.config, steps)
    rho = scheduler.sigmas.double()
    now, then = rho[:steps], torch.cat([rho[1:steps], rho[-1:]])
    alpha, next_alpha = torch.rsqrt(1 + now**2), torch.rsqrt(1 + then**2)
    # Euler's own start has deviation max rho, or sqrt(1 + rho^2), in x = z / alpha; DPM-Solver starts in z, with 1.
    start = float(scheduler.init_noise_sigma)
    init_scale = 1.0 if start == 1 else start * float(alpha[0])
    return Levels(scheduler.timesteps[:steps].double(), alpha, now * alpha, next_alpha, then * next_alpha, init_scale)


def _offset_error(config: Any, steps: int) -> UsageError:
    return UsageError(
        f"{steps} steps with steps_offset {config['steps_offset']} and {config['timestep_spacing']} spacing",
        f"the timesteps leave 0 to {config['num_train_timesteps'] - 1}, which the prior was trained on",
        "take fewer steps",
    )


def _check(levels: Levels, prediction: str, sampler: str, steps: int) -> None:
    falling = torch.cat(
        [levels.sigma / levels.alpha.clamp(min=1e-300), levels.next_sigma[-1:] / levels.next_alpha[-1:]]
    )
    # ddim may end at the level of timestep 0 (set_alpha_to_one false) when it is there already: a step of length zero.
    if not (falling[:-1].diff() < 0).all() or falling[-1] > falling[-2]:
        raise UsageError(f"{steps} steps of {sampler}", "the spacing repeats a noise level", "take fewer steps")
    if prediction == "epsilon" and levels.alpha[0] == 0:
        raise UsageError(
            "the first noise level has no signal (rescale_betas_zero_snr)",
            "a network that predicts epsilon says nothing about z0 there",
            "use a prior that predicts v_prediction or sample, or leading timestep spacing",
        )


def clean_factors(alpha: Tensor, sigma: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """(z0_z, z0_model) at levels of any one shape; prediction: of PREDICTION_TYPES, or "flow"."""
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "v_prediction":
        return alpha, -sigma
    if prediction == "flow":
        return torch.ones_like(alpha), -sigma
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def first_order(levels: Levels, config: Mapping[str, Any]) -> Update:
    """a' z0hat + s' eps with eps = (z - alpha z0hat) / sigma."""
    ratio = levels.next_sigma / levels.sigma
    zero = torch.zeros_like(ratio)
    return Update(z=ratio, z0=levels.next_alpha - ratio * levels.alpha, prev=zero, noise=zero)


def straight(levels: Levels, config: Mapping[str, Any]) -> Update:
    """Euler's step on rectified flow; with stochastic_sampling all noise is drawn anew, z' = a' z0hat + s' n."""
    if not config["stochastic_sampling"]:
        return first_order(levels, config)
    zero = torch.zeros_like(levels.alpha)
    return Update(z=zero, z0=levels.next_alpha, prev=zero, noise=levels.next_sigma)


def posterior(levels: Levels, config: Mapping[str, Any]) -> Update:
    """The mean and the variance of the DDPM posterior q(z' | z, z0hat), between any two levels."""
    alpha_step = levels.alpha / levels.next_alpha  # sqrt of the product of (1 - beta) between the levels
    beta = 1 - alpha_step**2
    share = levels.next_sigma**2 / levels.sigma**2
    zero = torch.zeros_like(beta)
    z0 = levels.next_alpha * beta / levels.sigma**2
    return Update(z=alpha_step * share, z0=z0, prev=zero, noise=(beta * share).clamp_min(0).sqrt())


def ancestral(levels: Levels, config: Mapping[str, Any]) -> Update:
    """DDPM: the posterior, or its mean with the variance beta (fixed_large), and no noise out of timestep 0."""
    exact = posterior(levels, config)
    large = config["variance_type"] == "fixed_large"
    noise = (1 - (levels.alpha / levels.next_alpha) ** 2).sqrt() if large else exact.noise
    return replace(exact, noise=torch.where(levels.timesteps > 0, noise, 0.0))


def consistency(levels: Levels, config: Mapping[str, Any]) -> Update:
    """LCM: the estimate with its boundary scalings, noised to the next level; that of the last step is zero noise."""
    data = 0.5  # sigma_data of the consistency models, which diffusers' class holds fixed
    time = levels.timesteps * config["timestep_scaling"]
    c_skip, c_out = data**2 / (time**2 + data**2), time / (time**2 + data**2).sqrt()
    a = levels.next_alpha
    return Update(z=a * c_skip, z0=a * c_out, prev=torch.zeros_like(a), noise=levels.next_sigma)


def second_order(levels: Levels, config: Mapping[str, Any]) -> Update:
    """DPM-Solver++ 2M, of first order in the first step, and in the last where diffusers' class is."""
    first = first_order(levels, config)
    lam = torch.log(levels.alpha / levels.sigma)
    following = torch.log(levels.next_alpha / levels.next_sigma)
    half_inverse_r = torch.zeros_like(lam)
    half_inverse_r[1:] = (following - lam)[1:] / lam.diff() / 2
    few = len(lam) < 15  # the number in diffusers; at zero noise lambda is infinite
    if config["final_sigmas_type"] == "zero" or config["euler_at_final"] or (config["lower_order_final"] and few):
        half_inverse_r[-1] = 0
    # -a' (e^-h - 1) is first.z0, because e^-h = (s' / a') (alpha / sigma).
    return Update(z=first.z, z0=first.z0 * (1 + half_inverse_r), prev=-first.z0 * half_inverse_r, noise=first.noise)


SAMPLERS: Mapping[str, Sampler] = {  # names as in dfkd.config.SAMPLERS
    "ddpm": Sampler(DDPM, ancestral, clip="z"),
    "ddim": Sampler(DDIM, first_order, flow=straight, clip="eps"),
    "euler": Sampler(EULER, first_order, flow=straight),
    "euler-ancestral": Sampler(ANCESTRAL, posterior),
    "dpmpp2m": Sampler(
        DPM, second_order, {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
    ),
    "lcm": Sampler(LCM, consistency, clip="z"),
}
