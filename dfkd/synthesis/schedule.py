"""A diffusers scheduler's config -> a table of step coefficients.

Every step of the samplers here is linear in the latents z, the network's output m, the noise n and the previous step's
clean estimate, so a step is one row:

    z0hat = z0_z z + z0_model m
    z'    = step_z z + step_model m + step_prev z0hat_before + step_noise n

with z = alpha z0 + sigma eps (alpha = sqrt(abar), sigma = sqrt(1 - abar): variance preserving, for Euler as well), and
m what the network predicts:

    epsilon       z0hat = (z - sigma m) / alpha
    v_prediction  z0hat = alpha z - sigma m               arXiv:2202.00512, appendix D
    sample        z0hat = m

From level (alpha, sigma) to (a', s'), with lambda = log(alpha / sigma) and h = lambda' - lambda:

    ddim, euler   z' = a' z0hat + s' eps                  arXiv:2010.02502 eq. 12 at eta = 0; arXiv:2206.00364 alg. 1 is
                                                          the same update in x = z / alpha
    ddpm          z' = posterior mean + std n             arXiv:2006.11239 eq. 7
    dpmpp2m       z' = s'/sigma z - a' (e^-h - 1) D       arXiv:2211.01095 alg. 2; r = h_before / h,
                  D = (1 + 1/2r) z0hat - 1/2r z0hat_before            first order in the first and the last step

Timesteps and noise levels are those that the diffusers class of the sampler makes of the config, as its `from_config`
would: keys that the config leaves out take that class's defaults.

A linear sampler of your own is a file, used as --sampler my.py:ancestral(eta=0.5):

    def ancestral(eta=1.0):
        def update(levels: Levels, config: Mapping[str, Any]) -> Update: ...
        return Sampler("DDIMScheduler", update)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dfkd.errors import UsageError
from dfkd.extension import resolve
from dfkd_kernels.guided_step import COEFFICIENTS

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

_EULER, _DPM = "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"
# Options that change the noise levels, their neutral value, and the diffusers classes that read them.
_LEVEL_OPTIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "use_karras_sigmas": (False, (_EULER, _DPM)),
    "use_exponential_sigmas": (False, (_EULER, _DPM)),
    "use_beta_sigmas": (False, (_EULER, _DPM)),
    "use_lu_lambdas": (False, (_DPM,)),
    "interpolation_type": ("linear", (_EULER,)),
    "timestep_type": ("discrete", (_EULER,)),
    "sigma_min": (None, (_EULER,)),
    "sigma_max": (None, (_EULER,)),
    "use_flow_sigmas": (False, ()),
}


@dataclass(frozen=True)
class Levels:
    """Where S steps lie, float64 [S] each in sampling order, noise first.

    timesteps: what the network gets as its time (whole numbers except for some Euler spacings). alpha, sigma: before
    the step; next_alpha, next_sigma: the level that it leads to, where sigma may be 0. init_scale: the first z is that
    times N(0, 1).
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
    """

    scheduler: str
    update: Callable[[Levels, Mapping[str, Any]], Update]
    forced: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepTable:
    """Coefficients of S steps, each a float64 tensor [S] on the CPU, in sampling order (noise first).

    timesteps, alpha, sigma, init_scale: as in Levels.
    z0_z, z0_model: z0hat = z0_z z + z0_model m.
    step_z, step_model, step_prev, step_noise: z' = step_z z + step_model m + step_prev z0hat_before + step_noise n.
    step_z0: dz'/dz0hat with eps held. Guidance moves z0hat by d at the same eps, hence z by alpha d, and so
        z' by step_z0 d.
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

    def __len__(self) -> int:
        return len(self.timesteps)

    def coefficients(self, like: Tensor, cfg: float = 1.0) -> Tensor:
        """[S, 8] on the device and in the dtype of `like`: a row of guided_step.COEFFICIENTS a step, cfg in all."""
        columns = [getattr(self, name) for name in COEFFICIENTS[:-1]]
        return torch.stack([*columns, torch.full_like(self.alpha, cfg)], 1).to(like.device, like.dtype)


def build_table(scheduler_config: Mapping[str, Any], sampler: str, steps: int) -> StepTable:
    """The coefficients of `sampler` in `steps` steps for a prior with this scheduler config.

    scheduler_config: content of a diffusers scheduler_config.json, of whichever class. sampler: as `find_sampler`.
    For ddim the level after a step is that of timestep t - T // steps, as in diffusers: the next timestep of the table
    for `leading` spacing, and one beside it for the other spacings where they do not divide T evenly.

    Raises UsageError: unknown sampler; steps the spacing cannot make; a config of another family (flow matching), with
    clipping or thresholding of z0hat, a learned variance, or a first level without signal (zero terminal SNR) where the
    network predicts epsilon.
    """
    own = find_sampler(sampler)
    _refuse_unsupported(scheduler_config, own, sampler)
    scheduler = _scheduler(scheduler_config, own, sampler, steps)
    prediction = str(scheduler.config["prediction_type"])
    levels = (_sigma_levels if hasattr(scheduler, "sigmas") else _abar_levels)(scheduler, steps)
    _check(levels, prediction, sampler, steps)
    update = own.update(levels, scheduler.config)
    z0_z, z0_model = _clean_estimate(levels, prediction)
    return StepTable(
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
    )


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


def _family() -> set[str]:
    """Classes whose configs describe one and the same kind of schedule; EDM's network is scaled in another way."""
    # diffusers takes seconds to load: it is imported where it is used, so that a command's --help need not wait for it.
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    return {member.name for member in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"}


def _refuse_unsupported(config: Mapping[str, Any], own: Sampler, sampler: str) -> None:
    """Raise UsageError for a config that a linear step would not honour."""
    name = config.get("_class_name", "")
    if name and name not in _family():
        raise UsageError(
            f"scheduler class {name}",
            "not a discrete variance-preserving schedule (flow matching and consistency models are other families)",
            "use a prior of the Stable Diffusion 1 or 2 kind",
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTION_TYPES:
        raise UsageError(f"prediction_type '{prediction}'", f"want one of {', '.join(PREDICTION_TYPES)}")
    # DDPM and DDIM clip unless told otherwise; the other classes have no such option.
    clips = config.get("clip_sample", name in ("DDPMScheduler", "DDIMScheduler"))
    for option, value in (("clip_sample", clips), ("thresholding", config.get("thresholding", False))):
        if value:
            raise UsageError(
                f"scheduler config: {option} is on",
                "it bounds pixel values, while this sampler works on latents, which have no such bounds",
                f'set "{option}": false in scheduler_config.json if the prior is a latent one',
            )
    variance = config.get("variance_type") or "fixed_small"
    if variance.startswith("learned") or (sampler == "ddpm" and variance not in ("fixed_small", "fixed_large")):
        raise UsageError(f"scheduler config: variance_type '{variance}'", "want fixed_small or fixed_large")
    for option, (neutral, readers) in _LEVEL_OPTIONS.items():
        if config.get(option) not in (neutral, None) and own.scheduler not in readers:
            able = [name for name, known in SAMPLERS.items() if known.scheduler in readers]
            raise UsageError(
                f"scheduler config: {option} = {config[option]}",
                f"sampler {sampler} has no such option",
                f"use {' or '.join(able)}" if able else "use another prior",
            )


def _scheduler(config: Mapping[str, Any], own: Sampler, sampler: str, steps: int) -> Any:
    """The sampler's diffusers scheduler, set to this many steps."""
    import diffusers  # here for the reason given in _family

    T = config.get("num_train_timesteps", 1000)
    if not 1 <= steps <= T:
        raise UsageError(f"steps {steps}", f"want 1 to {T}, the prior's number of training timesteps")
    try:
        scheduler = getattr(diffusers, own.scheduler).from_config({**config, **own.forced})
        scheduler.set_timesteps(steps)
    except (AttributeError, ValueError, NotImplementedError, ZeroDivisionError) as error:
        raise UsageError(f"scheduler config with sampler {sampler} and {steps} steps", str(error)) from error
    return scheduler


def _abar_levels(scheduler: Any, steps: int) -> Levels:
    """Levels at whole timesteps, for the classes of ddpm and ddim."""
    abar = scheduler.alphas_cumprod.double()
    # diffusers' trailing spacing makes one timestep too many, -1, where T / steps is not exact in floating point.
    timesteps = scheduler.timesteps[:steps]
    if timesteps.max() >= len(abar) or timesteps.min() < 0:
        raise _offset_error(scheduler.config, steps)
    if hasattr(scheduler, "final_alpha_cumprod"):  # ddim's
        following, final = timesteps - len(abar) // steps, scheduler.final_alpha_cumprod.double()
    else:
        following, final = torch.cat([timesteps[1:], torch.tensor([-1])]), abar.new_tensor(1.0)
    now, then = abar[timesteps], torch.where(following >= 0, abar[following.clamp(min=0)], final)
    return Levels(timesteps.double(), now.sqrt(), (1 - now).sqrt(), then.sqrt(), (1 - then).sqrt(), init_scale=1.0)


def _sigma_levels(scheduler: Any, steps: int) -> Levels:
    """Levels by noise-to-signal ratio rho = sigma / alpha, for the classes of euler and dpmpp2m."""
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


def _clean_estimate(levels: Levels, prediction: str) -> tuple[Tensor, Tensor]:
    """(z0_z, z0_model)."""
    alpha, sigma = levels.alpha, levels.sigma
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "v_prediction":
        return alpha, -sigma
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def first_order(levels: Levels, config: Mapping[str, Any]) -> Update:
    """a' z0hat + s' eps with eps = (z - alpha z0hat) / sigma."""
    ratio = levels.next_sigma / levels.sigma
    zero = torch.zeros_like(ratio)
    return Update(z=ratio, z0=levels.next_alpha - ratio * levels.alpha, prev=zero, noise=zero)


def ancestral(levels: Levels, config: Mapping[str, Any]) -> Update:
    """The DDPM posterior q(z' | z, z0hat), between any two levels."""
    alpha_step = levels.alpha / levels.next_alpha  # sqrt of the product of (1 - beta) between the levels
    beta = 1 - alpha_step**2
    large = config["variance_type"] == "fixed_large"
    variance = beta if large else beta * levels.next_sigma**2 / levels.sigma**2
    return Update(
        z=alpha_step * levels.next_sigma**2 / levels.sigma**2,
        z0=levels.next_alpha * beta / levels.sigma**2,
        prev=torch.zeros_like(beta),
        noise=torch.where(levels.timesteps > 0, variance.sqrt(), 0.0),  # no noise on the step out of timestep 0
    )


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
    "ddpm": Sampler("DDPMScheduler", ancestral),
    "ddim": Sampler("DDIMScheduler", first_order),
    "euler": Sampler(_EULER, first_order),
    "dpmpp2m": Sampler(
        _DPM, second_order, {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
    ),
}
