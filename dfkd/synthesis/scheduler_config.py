"""What a diffusers scheduler's config says: its kind of schedule, checked entries, and what no linear step honours.

    variance preserving  z = sqrt(abar) z0 + sqrt(1 - abar) eps, abar from the betas   arXiv:2006.11239
    flow                 z = (1 - sigma) z0 + sigma n, rectified flow                  arXiv:2209.03003

A config is JSON that somebody may have edited: every entry that the sampler's class reads is checked here, so that a
wrong one is named with its value before diffusers computes with it.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dfkd.errors import UsageError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")  # of a variance-preserving schedule
FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")

EULER, DPM, DDPM, DDIM = "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler", "DDIMScheduler"
LCM, ANCESTRAL, FLOW = "LCMScheduler", "EulerAncestralDiscreteScheduler", FLOW_CLASSES[0]

# Siblings of KarrasDiffusionSchedulers: their configs hold betas and a spacing in the same words.
_SIBLINGS = ("DDIMParallelScheduler", "DDPMParallelScheduler", "DDIMInverseScheduler", LCM, "TCDScheduler",
             "DPMSolverMultistepInverseScheduler", "SASolverScheduler")  # fmt: skip
_SPACED = (EULER, DPM, FLOW)
# Options that change the noise levels or the step, their neutral value, and the diffusers classes that read them.
_OPTIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "use_karras_sigmas": (False, _SPACED),
    "use_exponential_sigmas": (False, _SPACED),
    "use_beta_sigmas": (False, _SPACED),
    "use_lu_lambdas": (False, (DPM,)),
    "interpolation_type": ("linear", (EULER,)),
    "timestep_type": ("discrete", (EULER,)),
    "sigma_min": (None, (EULER,)),
    "sigma_max": (None, (EULER,)),
    "use_flow_sigmas": (False, ()),
    "snr_shift_scale": (1.0, ()),
    "scale_factors": (None, ()),
    "invert_sigmas": (False, ()),
    "thresholding": (False, ()),
}

Fits = tuple[Callable[[Any], bool], str]  # whether a value will do, and in words what will


def class_name(config: Mapping[str, Any]) -> str:
    """The diffusers class that the config names, "" where it names none; Flax twins go by the name of torch's class."""
    return str(config.get("_class_name") or "").removeprefix("Flax")


def is_flow(config: Mapping[str, Any]) -> bool:
    return class_name(config) in FLOW_CLASSES


def prediction_of(config: Mapping[str, Any]) -> str:
    """What the network predicts: one of PREDICTION_TYPES, or "flow" (n - z0)."""
    return "flow" if is_flow(config) else str(config.get("prediction_type", "epsilon"))


def check_config(
    config: Mapping[str, Any], sampler: str, reader: str, able: Callable[[tuple[str, ...]], list[str]]
) -> None:
    """Raise UsageError for a config that is malformed, of another kind, or that the sampler would not honour.

    reader: the diffusers class whose levels the sampler takes. able: classes -> names of samplers that take theirs.
    """
    _check_kind(config)
    given = parameters(reader).keys() & config.keys()
    if config.get("trained_betas") is not None:
        given -= {"beta_start", "beta_end"}  # not used then
    for key, (fits, wanted) in _ENTRIES.items():
        if key in given and not fits(config[key]):
            raise malformed(key, config[key], wanted)
    if is_flow(config):
        _check_flow(config)
    else:
        _check_betas(config, reader)
    for option, (neutral, readers) in _OPTIONS.items():
        if config.get(option) not in (neutral, None) and reader not in readers:
            instead = able(readers)
            raise UsageError(
                f"scheduler config: {option} = {config[option]!r}",
                f"sampler {sampler} has no such option",
                f"use {' or '.join(instead)}" if instead else "use another prior",
            )


def clip_range(config: Mapping[str, Any], pixels: bool, clips: bool, sampler: str, able: list[str]) -> float | None:
    """The bound of z0hat that clip_sample asks for, None where it is off.

    pixels: z are images in -1..1. clips: whether the sampler's class has the option. able: samplers that do.
    Raises UsageError: clipping of latents, or by a sampler that does not.
    """
    # What a config leaves out is as its own class has it: DDPM and DDIM clip unless told otherwise.
    own = parameters(name) if (name := class_name(config)) else {}
    if not config.get("clip_sample", own["clip_sample"].default if "clip_sample" in own else False):
        return None
    if not pixels:
        raise UsageError(
            "scheduler config: clip_sample is on",
            "it bounds pixel values, while this sampler works on latents, which have no such bounds",
            'set "clip_sample": false in scheduler_config.json if the prior is a latent one',
        )
    if not clips:
        raise UsageError(
            "scheduler config: clip_sample is on", f"sampler {sampler} has no such option", f"use {' or '.join(able)}"
        )
    return float(config.get("clip_sample_range", 1.0))


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """The entries that a diffusers class reads. Raises UsageError where there is no such class."""
    import diffusers  # here for the reason given in _check_kind

    if not hasattr(diffusers, name):
        raise UsageError(f"scheduler class {name}", "diffusers has none of that name", "name one of its schedulers")
    return dict(inspect.signature(getattr(diffusers, name).__init__).parameters)


def malformed(key: str, value: Any, wanted: str) -> UsageError:
    shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:76]}..."
    return UsageError(f"scheduler config: {key} is {shown}", f"want {wanted}", "correct scheduler_config.json")


def _check_kind(config: Mapping[str, Any]) -> None:
    # diffusers takes seconds to load: it is imported where it is used, so that a command's --help need not wait for it.
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    named = config.get("_class_name")
    if named is not None and not isinstance(named, str):
        raise malformed("_class_name", named, "the name of a diffusers scheduler")
    # EDM's network is scaled in another way.
    known = {member.name for member in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"}
    if (name := class_name(config)) and name not in known.union(_SIBLINGS, FLOW_CLASSES):
        raise UsageError(
            f"scheduler class {name}",
            "neither a variance-preserving schedule by betas nor rectified flow",
            "use a prior whose scheduler is of the kind of DDIMScheduler or FlowMatchEulerDiscreteScheduler",
        )


def _check_betas(config: Mapping[str, Any], reader: str) -> None:
    """That the betas are there, as many as there are timesteps, and in order."""
    if "trained_betas" not in (read := parameters(reader)):
        return
    count = config.get("num_train_timesteps", read["num_train_timesteps"].default)
    if (trained := config.get("trained_betas")) is not None:
        if len(trained) != count:
            wanted = f"{count} of them, one for each of num_train_timesteps"
            raise malformed("trained_betas", trained, wanted)
        return
    start, end = (config.get(key, read[key].default) for key in ("beta_start", "beta_end"))
    if start > end:
        raise malformed("beta_start", start, f"at most beta_end, which is {end}")


def _check_flow(config: Mapping[str, Any]) -> None:
    if (prediction := config.get("prediction_type")) not in (None, "flow_prediction"):
        raise malformed("prediction_type", prediction, "none, or flow_prediction: rectified flow predicts n - z0")
    short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    if config.get("use_dynamic_shifting") and short >= long:
        raise malformed("base_image_seq_len", short, f"less than max_image_seq_len, which is {long}")


def _number(low: float, high: float = math.inf) -> Fits:
    """A finite number between the bounds, which themselves will not do."""

    def fits(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and low < value < high

    if high < math.inf:
        return fits, f"a number between {low} and {high}"
    return fits, "a number" if low == -math.inf else f"a number above {low}"


def _count(low: int, high: int) -> Fits:
    return lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}"


def _word(*known: str) -> Fits:
    return lambda value: isinstance(value, str) and value in known, f"one of {', '.join(known)}"


def _or_none(other: Fits) -> Fits:
    return lambda value: value is None or other[0](value), f"null, or {other[1]}"


def _is_betas(value: Any) -> bool:
    try:
        betas = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return False
    return betas.dim() == 1 and bool(((betas >= 0) & (betas <= 1)).all())


_FLAG: Fits = (lambda value: isinstance(value, bool), "true or false")
_SIGMA = _or_none(_number(0))
_MOST = 1_000_000  # timesteps, a thousand times what networks are trained on: beyond, the betas fill the memory
_LENGTH, _SHIFT = _count(1, _MOST), _number(-math.inf)

_ENTRIES: dict[str, Fits] = {
    "num_train_timesteps": _count(1, _MOST),
    "beta_start": _number(0, 1),
    "beta_end": _number(0, 1),
    "beta_schedule": _word("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"),
    "trained_betas": _or_none((_is_betas, "a list of numbers between 0 and 1")),
    "prediction_type": _word(*PREDICTION_TYPES),
    "timestep_spacing": _word("leading", "trailing", "linspace"),
    "steps_offset": _count(0, _MOST),
    "set_alpha_to_one": _FLAG,
    "rescale_betas_zero_snr": _FLAG,
    "clip_sample": _FLAG,
    "clip_sample_range": _number(0),
    "thresholding": _FLAG,
    "variance_type": _or_none(
        _word("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
    ),
    "use_karras_sigmas": _or_none(_FLAG),
    "use_exponential_sigmas": _or_none(_FLAG),
    "use_beta_sigmas": _or_none(_FLAG),
    "use_lu_lambdas": _or_none(_FLAG),
    "use_flow_sigmas": _or_none(_FLAG),
    "interpolation_type": _word("linear", "log_linear"),
    "timestep_type": _word("discrete", "continuous"),
    "sigma_min": _SIGMA,
    "sigma_max": _SIGMA,
    "final_sigmas_type": _word("zero", "sigma_min"),
    "lower_order_final": _FLAG,
    "euler_at_final": _FLAG,
    "lambda_min_clipped": (lambda value: isinstance(value, int | float) and value == value, "a number"),
    "original_inference_steps": _count(1, _MOST),
    "timestep_scaling": _number(0),
    "shift": _number(0),
    "use_dynamic_shifting": _FLAG,
    "base_shift": _SHIFT,
    "max_shift": _SHIFT,
    "base_image_seq_len": _LENGTH,
    "max_image_seq_len": _LENGTH,
    "shift_terminal": _or_none(_number(0, 1)),
    "time_shift_type": _word("exponential", "linear"),
    "stochastic_sampling": _FLAG,
}
