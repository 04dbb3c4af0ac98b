"""TeacherGuidance: the teacher's guidance inside any diffusers pipeline, which stays as it is.

    guidance = dfkd.TeacherGuidance(teacher, pipe.vae, step=0.2)
    pipe.scheduler = dfkd.guided(pipe.scheduler, guidance.for_labels(["zero", "one"]))
    images = pipe(["a photo of zero", "a photo of one"]).images

Where `ours` is a GuidedPipeline, `dfkd.TeacherGuidance.of(ours)` guides by its settings, with its compiled engines.

A guided scheduler moves the clean estimate before its step, as the `latent` path of sampler.py does: z0hat <- z0hat -
rho g with eps held. Classifier-free guidance has been combined by then. `TeacherGuidance.callback` is the other way in,
behind the step.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from dfkd.config import GuidanceConfig
from dfkd.config.words import nearest
from dfkd.errors import SettingError, UsageError
from dfkd.synthesis.diffusers_gradient import AutogradGradient, PipelineGradient
from dfkd.synthesis.diffusers_levels import (
    STRAIGHT,
    begins_step,
    clip_of,
    level_of,
    levels_around,
    place_of,
    require_known,
)
from dfkd.synthesis.losses import GuidanceLoss, losses_of
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd.synthesis.sampler import Clip, unit_rms
from dfkd.synthesis.views import draw
from dfkd.teachers import Classifier

Scheduler = TypeVar("Scheduler")

# Settings of GuidanceConfig that act elsewhere than at a scheduler's step, and the values that leave them off.
_ELSEWHERE = {"step_trials": 0, "gradient": "latent", "noise_edit_steps": 0, "refine_steps": 0, "reencode": 0}


class TeacherGuidance:
    """A teacher's guidance of the images that a diffusers pipeline draws.

    Args:
        teacher: frozen, and moved to the latents' device.
        vae: the pipeline's, which decodes the clean estimates, frozen as well; None for a pipeline of pixels. A float16
            one whose config says force_upcast is copied to float32: backward it overflows sooner than forward.
        student: of the adversarial loss, copied.
        losses: guidance losses beside those of the settings.
        batch: images per call of decoder and teacher; 0: all.
        settings: fields of GuidanceConfig: step, repeats, norm, start, stop, bn_weight, cls_weight, bn_stats, view (a
            dfkd.config.ViewConfig), ...

    Attributes:
        config: the settings. record: {step: {loss: [B]}} of the last images, unweighted, as they were at that step.

    With bn_stats="group", the default, the images of one call of the pipeline are the group.

    Raises UsageError: settings that act outside a scheduler's step, no loss, a VAE without a scaling factor, or what
    `Guidance` refuses. ValueError: an unknown setting or value.
    """

    def __init__(
        self,
        teacher: Classifier,
        vae: Any,
        *,
        student: Classifier | None = None,
        losses: Sequence[GuidanceLoss] = (),
        batch: int = 0,
        **settings: Any,
    ) -> None:
        own = ("losses", "decoder")  # losses are an argument; the decoder is the vae that is given
        known = [field.name for field in dataclasses.fields(GuidanceConfig) if field.name not in own]
        if unknown := sorted(settings.keys() - set(known)):
            raise SettingError(f"TeacherGuidance has no setting {unknown[0]!r}: {nearest(unknown[0], known)}")
        config = GuidanceConfig(**settings)
        _require_at_steps(config)
        if vae is not None and "scaling_factor" not in vae.config:
            raise UsageError(
                f"{type(vae).__name__}", "it has no scaling_factor for its latents", "use an AutoencoderKL"
            )
        every = (*losses_of(config), *losses)
        if not every:
            raise UsageError("no guidance loss", "every weight is 0", "give one a weight")
        self._begin(config, teacher, AutogradGradient(teacher, vae, student, every, batch, config.softplus_beta))

    @classmethod
    def of(cls, pipeline: GuidedPipeline) -> Self:
        """The guidance of a GuidedPipeline: its settings, losses, student and decoder, with its compiled engines.

        Engines are chosen and loaded as for its own images; `describe` tells what computes the gradient. Sampler, steps
        and classifier-free guidance are the diffusers pipeline's, whose latents must be those of the GuidedPipeline's
        prior, of its size and on its device. With bn_stats="group" a call holds whole groups of it.

        Raises UsageError: it has no guidance, settings that act outside a scheduler's step, or a named backend lacks
        its engines (with the command that builds them). EngineError: an engine is damaged.
        """
        config = pipeline.config.guidance
        _require_at_steps(config)
        if every := pipeline.config.cutmix.every:
            raise UsageError(f"cutmix_every = {every}", "it acts outside the steps of a scheduler", "leave it at 0")
        if pipeline.guidance is None:
            why = "its guidance_step is 0, or every weight is"
            raise UsageError("a GuidedPipeline without guidance", why, "give it a step, and a loss a weight")
        pipeline.ready_engines()
        made = cls.__new__(cls)
        made._begin(config, pipeline.teacher, PipelineGradient(pipeline))
        return made

    def _begin(
        self, config: GuidanceConfig, teacher: Classifier, gradient: AutogradGradient | PipelineGradient
    ) -> None:
        self.config, self.teacher, self._gradient = config, teacher, gradient
        self.record: dict[int, dict[str, Tensor]] = {}
        self._labels: tuple[int, ...] = ()

    def for_labels(self, labels: Sequence[int | str]) -> "TeacherGuidance":
        """Set the classes of the next images, and return the guidance itself.

        labels: numbers or names of the teacher's classes, one for each image in the pipeline's order: those of a prompt
        follow one another. Raises UsageError: no such class.
        """
        self._labels = tuple(self._class_of(label) for label in labels)
        return self

    def push(self, clean: Tensor, i: int, steps: int, clip: Clip | None = None, noise: float = 1.0) -> Tensor | None:
        """What guidance adds to the clean estimates [B, C, h, w] at step i of `steps`; None where it does not act.

        clip: bounds of the estimates, with what is added. noise: sigma of z = alpha z0 + sigma eps before the step, the
        time of a rectified flow, by which a step is shorter with a `power`. Views are those of seed 0 and images that
        are numbered by row: each call of the pipeline has the same.
        """
        config = self.config
        if not config.step or not config.start <= i / steps < config.stop:
            return None
        if self.record and i <= max(self.record):  # another call of the pipeline
            self.record = {}
        labels = self._labels_of(clean)
        self._gradient.require_fit(clean)
        with torch.inference_mode(False), torch.no_grad():  # inference mode's own tensors take no gradient
            clean = clean.clone()
            push = torch.zeros_like(clean) if clip is None else clip.push(clean, torch.zeros_like(clean))
            length = config.step * noise**config.power
            for repeat in range(config.repeats):
                view = self._view(clean, i * config.repeats + repeat)
                gradient, self.record[i] = self._gradient(clean + push, labels, view)
                push = push - length * (unit_rms(gradient) if config.norm == "rms" else gradient)
                push = push if clip is None else clip.push(clean, push)
        return push

    def decode(self, z0: Tensor) -> Tensor:
        """Clean latents [B, C, h, w] -> images [B, 3, H, W] in 0..1, as the pipelines decode; differentiable."""
        return self._gradient.decode(z0)

    def describe(self) -> list[str]:
        """Lines for people: kernels, and what computes the gradient."""
        return self._gradient.describe()

    def callback(self) -> Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor]]:
        """A function for a pipeline's `callback_on_step_end`: the push, added behind the step.

        A step of Euler or DDIM (eta 0) is a line: from x = A z0 + S eps and x' = A' z0 + S' eps follow z0hat and eps,
        and x' + A' d is the step that a guided scheduler makes. Differences: the first step is not guided, since nobody
        shows the sample before it; schedulers with noise or memory are refused; and in half precision z0hat, a
        difference of near samples, is known to some percents.
        """
        before: Tensor | None = None

        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            nonlocal before
            scheduler = pipe.scheduler
            _require_straight(scheduler)
            latents = tensors["latents"]
            if step > 0 and before is not None:
                now, then = levels_around(scheduler, timestep)
                wide = torch.promote_types(latents.dtype, torch.float32)
                x, moved = before.to(wide), latents.to(wide)
                clean = (then.S * x - now.S * moved) / (then.S * now.A - now.S * then.A)
                place = place_of(scheduler, timestep) - (getattr(scheduler, "step_index", None) is not None)
                if (push := self.push(clean, place, len(scheduler.timesteps), noise=float(now.sigma))) is not None:
                    latents = (moved + then.A * push).to(latents.dtype)
            before = latents
            return {"latents": latents}

        return on_step_end

    def _view(self, clean: Tensor, number: int) -> Tensor | None:
        """How the images of clean latents are seen at gradient `number` of a call; None: as they are."""
        own, ids = self.config.view, torch.arange(len(clean), device=clean.device)
        return draw(own, 0, ids, number, self._gradient.side(clean), self.teacher.input_size) if own.acts else None

    def _class_of(self, label: int | str) -> int:
        names = self.teacher.class_names
        if isinstance(label, str):
            if label not in names:
                raise UsageError(f"no class {label!r}", nearest(label, names), "name a class of the teacher")
            return names.index(label)
        if not 0 <= int(label) < len(names):
            raise UsageError(f"no class {label}", f"the teacher has {len(names)}", "count them from 0")
        return int(label)

    def _labels_of(self, clean: Tensor) -> Tensor:
        """int64 [B] on the device of the clean estimates. Raises UsageError where there are not as many."""
        if len(self._labels) != len(clean):
            what = f"{len(self._labels)} labels for {len(clean)} rows of latents"
            why = "every row has one, in the pipeline's order; DiTPipeline holds its images twice under guidance_scale"
            raise UsageError(what, why, "give them: guidance.for_labels([...])")
        with torch.inference_mode(False):
            return torch.tensor(self._labels, device=clean.device)


def guided(scheduler: Scheduler, guidance: TeacherGuidance) -> Scheduler:
    """A copy of a diffusers scheduler whose every step is guided.

    It is an instance of a class derived from the scheduler's own, of the same name, so that pipelines and
    `save_pretrained` take it as that: what they save is the plain scheduler. `type(it).from_config` makes guided ones;
    diffusers' own classes make plain ones of its config. A step moves the clean estimate by the
    guidance's push with eps held, and is the scheduler's own from there. Exact for every scheduler whose step starts
    from the sample it is given; guidance acts once a step in Heun, KDPM2 and PNDM, and UniPC's corrector takes back a
    part of it.

    Raises UsageError: a scheduler whose noise levels are not known, or DPMSolverSinglestep of an order above 1, whose
    further evaluations start from the sample of the first and would drop the moved one; a guidance without labels when
    it steps.
    """
    plain: Any = getattr(scheduler, "_unguided", type(scheduler))
    require_known(scheduler)

    class Guided(plain):  # type: ignore[misc]
        _unguided = plain

        @functools.wraps(plain.step)
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *rest: Any, **options: Any) -> Any:
            model_output, sample = _moved(self, guidance, model_output, timestep, sample)
            return super().step(model_output, timestep, sample, *rest, **options)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Guided, name, getattr(plain, name))
    made = object.__new__(Guided)
    made.__dict__ = copy.deepcopy(scheduler.__dict__)
    return made


def _moved(
    scheduler: Any, guidance: TeacherGuidance, output: Tensor, timestep: Any, sample: Tensor
) -> tuple[Tensor, Tensor]:
    """The network's output and the sample for the guided clean estimate, in their own dtypes."""
    if sample.dim() != 4:
        what = f"latents of the shape {list(sample.shape)}"
        raise UsageError(
            what, "guidance decodes [B, C, h, w]; packed and video latents are others", "use another pipeline"
        )
    if not begins_step(scheduler):
        return output, sample
    level, wide = level_of(scheduler, timestep), torch.promote_types(sample.dtype, torch.float32)
    place = place_of(scheduler, timestep)
    channels = sample.shape[1]
    predicted, variance = output[:, :channels], output[:, channels:]  # a learned variance stays as it is
    x, m, clip = sample.to(wide), predicted.to(wide), clip_of(scheduler)
    clean = level.clean(x, m)
    if clip is not None and clip.holds_z:
        clean = clean.clamp(-clip.limit, clip.limit)
        m = level.output_of(x, clean)
    push = guidance.push(clean, place, len(scheduler.timesteps), clip, float(level.sigma))
    if push is None:
        return output, sample
    x, m = level.moved(x, m, push)
    return torch.cat([m.to(output.dtype), variance], 1), x.to(sample.dtype)


def _require_at_steps(config: GuidanceConfig) -> None:
    """Raise UsageError for a setting that acts elsewhere than at a scheduler's step."""
    for name, off in _ELSEWHERE.items():
        if (value := getattr(config, name)) != off:
            raise UsageError(f"{name} = {value!r}", "it acts outside the steps of a scheduler", f"leave it at {off!r}")


def _require_straight(scheduler: Any) -> None:
    """Raise UsageError for a scheduler whose step does not tell the clean estimate, or that guides already."""
    name, config = type(scheduler).__name__, scheduler.config
    todo = "use pipe.scheduler = dfkd.guided(pipe.scheduler, guidance) instead"
    if hasattr(scheduler, "_unguided"):
        raise UsageError("the callback with a guided scheduler", "both would guide", "use one of them")
    if name not in STRAIGHT or getattr(config, "stochastic_sampling", False):
        raise UsageError(f"the callback with {name}", "its step has noise or memory and hides the clean estimate", todo)
    if getattr(config, "clip_sample", False) or getattr(config, "thresholding", False):
        raise UsageError(f"the callback with {name}", "its clean estimate is clipped", todo)
    require_known(scheduler)
