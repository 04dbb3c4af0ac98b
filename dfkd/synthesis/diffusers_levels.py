"""Where a diffusers scheduler stands: the noise level of its next step, read from its own tables.

Its sample is x = A z0 + S eps, in the scale of its kind:

    by abar   A = sqrt(abar), S = sqrt(1 - abar)             DDIM, DDPM, LCM, TCD, PNDM
    by sigma  the same from sigma = S / A                    DPM-Solver, DEIS, UniPC
    scaled    A = 1, S = sigma: x = z / sqrt(abar)           Euler, Heun, KDPM2, LMS (arXiv:2206.00364)
    flow      A = 1 - sigma, S = sigma                       FlowMatch...

A clean estimate that moves by d with eps held is x + A d and an output of the network moved by its prediction type.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfkd.errors import UsageError
from dfkd.synthesis.sampler import Clip
from dfkd.synthesis.schedule import clean_factors
from dfkd.synthesis.scheduler_config import FLOW_CLASSES, PREDICTION_TYPES

_BY_ABAR = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "LCMScheduler",
            "TCDScheduler", "PNDMScheduler")  # fmt: skip
_SCALED = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
           "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler")  # fmt: skip
_BY_SIGMA = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler",
             "UniPCMultistepScheduler")  # fmt: skip
KNOWN = (*_BY_ABAR, *_SCALED, *_BY_SIGMA, *FLOW_CLASSES)
_CLIPS_AT_Z = ("DDPMScheduler", "DDPMParallelScheduler", "LCMScheduler", "HeunDiscreteScheduler")  # the others at eps
# Schedulers whose step x -> x' is a line between two levels, so that both samples tell the clean estimate.
STRAIGHT = ("DDIMScheduler", "DDIMParallelScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")


@dataclass(frozen=True)
class Level:
    """x = A z0 + S eps, where z = scale x = alpha z0 + sigma eps is what the network sees; float64 [] on the CPU."""

    alpha: Tensor
    sigma: Tensor
    scale: Tensor
    prediction: str

    @property
    def A(self) -> Tensor:
        return self.alpha / self.scale

    @property
    def S(self) -> Tensor:
        return self.sigma / self.scale

    def clean(self, x: Tensor, output: Tensor) -> Tensor:
        """The clean estimate of the network's output at the sample x."""
        of_z, of_output = clean_factors(self.alpha, self.sigma, self.prediction)
        return of_z * self.scale * x + of_output * output

    def output_of(self, x: Tensor, clean: Tensor) -> Tensor:
        """The network's output at the sample x whose clean estimate this is."""
        of_z, of_output = clean_factors(self.alpha, self.sigma, self.prediction)
        return (clean - of_z * self.scale * x) / of_output

    def moved(self, x: Tensor, output: Tensor, push: Tensor) -> tuple[Tensor, Tensor]:
        """Sample and output of the network for the clean estimate plus `push`, at the same eps."""
        along = {"epsilon": 0.0, "v_prediction": -float(self.sigma), "sample": 1.0, "flow": -1.0}
        return x + self.A * push, output + along[self.prediction] * push


def require_known(scheduler: Any) -> None:
    """Raise UsageError for a scheduler whose levels are not known here."""
    kind, prediction = _kind(scheduler), _prediction(scheduler)
    todo = "use another: pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)"
    if not kind:
        raise UsageError(
            f"scheduler {type(scheduler).__name__}", f"its levels are unknown; known: {', '.join(KNOWN)}", todo
        )
    if prediction not in (*PREDICTION_TYPES, "flow"):
        raise UsageError(f"prediction_type '{prediction}' of {kind}", "what it means for z0 is unknown", todo)
    if kind == "PNDMScheduler" and (prediction != "epsilon" or not scheduler.config.skip_prk_steps):
        what = f"PNDMScheduler with prediction_type {prediction}, skip_prk_steps {scheduler.config.skip_prk_steps}"
        raise UsageError(what, "it mixes outputs of several steps, at whose eps it does not hold", todo)
    if kind == "DPMSolverSinglestepScheduler" and scheduler.config.solver_order > 1:
        what = f"DPMSolverSinglestepScheduler with solver_order {scheduler.config.solver_order}"
        why = "its further evaluations start from the sample of the first, so that a part of the guidance would be lost"
        raise UsageError(what, why, todo.replace("EulerDiscrete", "DPMSolverMultistep"))
    if getattr(scheduler.config, "invert_sigmas", False):
        raise UsageError(f"{kind} with invert_sigmas", "its levels run the other way", todo)


def level_of(scheduler: Any, timestep: Any) -> Level:
    """The level of the sample that the scheduler's next step takes, at one of its timesteps."""
    if _kind(scheduler) in _BY_ABAR:
        return _of_abar(scheduler, scheduler.alphas_cumprod[int(timestep)])
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    return _of_sigma(scheduler, scheduler.sigmas[scheduler.step_index])


def levels_around(scheduler: Any, timestep: Any) -> tuple[Level, Level]:
    """The levels before and after the step from `timestep` that a scheduler of STRAIGHT has just made."""
    if _kind(scheduler) in _BY_ABAR:
        after = int(timestep) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        then = scheduler.alphas_cumprod[after] if after >= 0 else scheduler.final_alpha_cumprod
        return level_of(scheduler, timestep), _of_abar(scheduler, then)
    i = scheduler.step_index
    return _of_sigma(scheduler, scheduler.sigmas[i - 1]), _of_sigma(scheduler, scheduler.sigmas[i])


def clip_of(scheduler: Any) -> Clip | None:
    """How the scheduler bounds its clean estimate, None where it does not (clip_sample)."""
    if not getattr(scheduler.config, "clip_sample", False):
        return None
    limit = float(getattr(scheduler.config, "clip_sample_range", 1.0))
    return Clip(limit, holds_z=_kind(scheduler) in _CLIPS_AT_Z)


def begins_step(scheduler: Any) -> bool:
    """Whether the next step starts from the sample that it is given; the second half of Heun's and KDPM2's, and PNDM's
    second call, start from the one before."""
    if _kind(scheduler) == "PNDMScheduler":
        return bool(scheduler.counter != 1)
    return bool(getattr(scheduler, "state_in_first_order", True))


def place_of(scheduler: Any, timestep: Any) -> int:
    """The number of the step from `timestep`, before it is made, among all those of the schedule."""
    if (index := getattr(scheduler, "step_index", None)) is not None:
        return int(index)
    return int((scheduler.timesteps == timestep).nonzero()[0])


def _of_abar(scheduler: Any, abar: Tensor) -> Level:
    abar = abar.double().cpu()
    return Level(abar.sqrt(), (1 - abar).sqrt(), torch.ones_like(abar), _prediction(scheduler))


def _of_sigma(scheduler: Any, sigma: Tensor) -> Level:
    s, prediction = sigma.double().cpu(), _prediction(scheduler)
    if _kind(scheduler) in FLOW_CLASSES or getattr(scheduler.config, "use_flow_sigmas", False):
        return Level(1 - s, s, torch.ones_like(s), prediction)
    alpha = torch.rsqrt(1 + s**2)
    return Level(alpha, s * alpha, alpha if _kind(scheduler) in _SCALED else torch.ones_like(s), prediction)


def _kind(scheduler: Any) -> str:
    """The scheduler's class as it is known here, "" for none; a class derived from one steps as that one does."""
    return next((cls.__name__ for cls in type(scheduler).__mro__ if cls.__name__ in KNOWN), "")


def _prediction(scheduler: Any) -> str:
    if _kind(scheduler) in FLOW_CLASSES:
        return "flow"
    found = str(getattr(scheduler.config, "prediction_type", "epsilon"))
    return "flow" if found == "flow_prediction" else found
