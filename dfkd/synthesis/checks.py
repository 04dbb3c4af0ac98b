"""What has to fit before a guided synthesis begins: prior, teacher, student, losses and settings."""

import copy
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from dfkd.config import RESIZES, CandidatesConfig, FilterConfig, GenerateConfig, GuidanceConfig, SamplingConfig, leaves
from dfkd.errors import UsageError
from dfkd.extension import running
from dfkd.files import read_object
from dfkd.synthesis.guidance import Guidance
from dfkd.teachers import Classifier
from dfkd.teachers.committee import Committee
from dfkd.teachers.sources import config_of
from dfkd_engine.attention import choose_attention, set_attention
from dfkd_engine.errors import EngineError
from dfkd_engine.group_norms import set_group_norms
from dfkd_engine.priors.guidance_decoder import Decoder
from dfkd_engine.priors.prior import DTYPES, Prior

# Settings that no engine follows from.
_LOCAL: tuple[str, ...] = ("backend", "engines", "shard_size", "image_format", "class_words", "step_trials")
_LOCAL += (*leaves(CandidatesConfig), *leaves(FilterConfig))


def prepare_prior(prior: Prior, config: GenerateConfig, device: torch.device, kernels: str) -> Prior:
    """The prior, moved to the device, with the attention and the group norms that are asked for.

    Raises UsageError: another dtype than that of the settings, or an attention that cannot run.
    """
    compute = config.compute
    if prior.dtype != DTYPES[compute.dtype]:
        kind = next((name for name, dtype in DTYPES.items() if dtype == prior.dtype), str(prior.dtype))
        what = f"the prior is in {kind}, the settings say {compute.dtype}"
        raise UsageError(what, "networks are not converted", f"load it with dtype={compute.dtype!r}, or set --dtype")
    # fp32 is meant: TF32, cuDNN's default, keeps 10 bits of a factor, and images would differ between devices.
    torch.backends.cudnn.allow_tf32 = False
    try:
        attention = choose_attention(compute.attention, device, prior.dtype)
        for network in (prior.denoiser, prior.vae):
            if network is None:
                continue
            set_attention(network, attention.name)
            set_group_norms(network, kernels)
    except EngineError as error:
        raise UsageError(error.what, error.why, error.todo) from None
    return prior.to(device)


def open_decoder(prior: Prior, config: GenerateConfig, device: torch.device, kernels: str) -> Decoder | None:
    """The decoder that guidance has of its own, in the prior's dtype, None where the settings name none or no teacher
    guides.

    Raises UsageError: it cannot be loaded, or is not for the prior's latents.
    """
    if config.guidance.decoder is None or not config.guidance.step:
        return None
    try:
        offline = bool(prior.files.get("offline"))
        decoder = Decoder.from_pretrained(config.guidance.decoder, prior.dtype, device, offline)
        decoder.check(prior)
        set_attention(decoder.network, choose_attention(config.compute.attention, device, prior.dtype).name)
    except EngineError as error:
        raise UsageError(f"--guidance-decoder: {error.what}", error.why, error.todo) from None
    set_group_norms(decoder.network, kernels)
    return decoder


def latent_size(size: int, prior: Prior) -> tuple[int, int]:
    """(h, w) of the latents of images of this side, 0 for the prior's own. Raises UsageError where it does not fit."""
    factor = prior.vae_scale_factor
    if not size:
        if prior.latent_size is None:
            raise UsageError("the prior's config states no sample_size", "images need one", "give --size")
        if len(set(prior.latent_size)) > 1:
            raise UsageError(f"the prior's latents are {prior.latent_size}", "images are square here", "give --size")
        return prior.latent_size
    if size % factor:
        why = f"its decoder enlarges latents {factor} times"
        raise UsageError(f"--size {size} does not fit the prior", why, f"choose a multiple of {factor}")
    family, side = prior.family, size // factor
    if side % family.multiple:
        least = family.multiple * factor
        why = f"its denoiser takes latents of a multiple of {family.multiple}"
        raise UsageError(f"--size {size} does not fit the prior", why, f"choose a multiple of {least}")
    if family.largest is not None and side > family.largest:
        why = f"its denoiser knows places in latents of up to {family.largest}"
        raise UsageError(f"--size {size} does not fit the prior", why, f"choose at most {family.largest * factor}")
    return side, side


def patches_of(prior: Prior, latents: tuple[int, int]) -> int | None:
    """How many patches a transformer makes of latents of this size; None for a UNet."""
    patch = getattr(getattr(prior.denoiser, "config", None), "patch_size", None)
    return None if patch is None else (latents[0] // patch) * (latents[1] // patch)


def cfg_of(sampling: SamplingConfig, prior: Prior) -> float:
    """The scale of classifier-free guidance: of the settings, or else 3, or 1 for a prior that has no way to use it.

    Raises UsageError for a scale, a share of the steps or a negative prompt that would not act.
    """
    own, name = prior.family.cfg, prior.family.name
    cfg = (1.0 if own == "none" else 3.0) if sampling.cfg is None else sampling.cfg
    if own == "none" and cfg > 1:
        why = f"the prior, {name}, has no unconditional rows to move away from"
        raise UsageError(f"--cfg {cfg:g} cannot act", why, "leave it out, or use --cfg 1")
    if own == "input" and (sampling.cfg_from, sampling.cfg_to) != (0, 1):
        why, todo = "the prior takes one scale for all steps, as an input", "use --cfg-from 0 --cfg-to 1, the defaults"
        raise UsageError("--cfg-from and --cfg-to cannot act", why, todo)
    rows = any(sampling.cfg_acts(step, cfg) for step in range(sampling.steps))
    if cfg > 1 and not rows and sampling.cfg_from < sampling.cfg_to:
        window = f"--cfg-from {sampling.cfg_from:g} --cfg-to {sampling.cfg_to:g}"
        why = f"none of the {sampling.steps} steps begins in {window}, of which step i begins at i / {sampling.steps}"
        raise UsageError(f"--cfg {cfg:g} cannot act", why, "take more steps, other shares, or --cfg 1")
    if sampling.negative_prompt and not (own == "rows" and prior.family.texts and rows):
        why = f"the prior, {name}, has no unconditional rows with a text"
        if own == "rows" and prior.family.texts:
            why = "there are unconditional rows with --cfg above 1 alone"
        raise UsageError(f"--negative-prompt {sampling.negative_prompt!r} cannot act", why, "leave it out")
    return cfg


def idle(config: GenerateConfig, prior: Prior) -> list[str]:
    """Warnings of settings that presets carry and that will not act in this run."""
    found = []
    if config.sampling.prompt and not prior.family.inputs:
        found.append(f"--prompt does not act: the prior, {prior.family.name}, is told nothing")
    if config.cutmix.every >= config.sampling.steps:
        found.append(f"--cutmix-every {config.cutmix.every} does not act in {config.sampling.steps} steps")
    return found


def copy_student(student: Classifier, teacher: Classifier) -> Classifier:
    """A frozen copy beside the teacher, whoever trains the student further. Raises UsageError for other classes, and as
    `Classifier.tried`."""
    if student.class_names != teacher.class_names:
        raise UsageError(
            f"the student has {len(student.class_names)} classes that are not the teacher's",
            f"the teacher has {len(teacher.class_names)}: {', '.join(teacher.class_names[:10])}",
            "give a student distilled from this teacher",
        )
    return student.replace(module=copy.deepcopy(student.module)).freeze(teacher.device).tried()


def require_losses(config: GuidanceConfig, losses: Sequence[object]) -> None:
    """Raise UsageError for steps that would descend no loss."""
    for flag, steps in (("refine", config.refine_steps), ("noise-edit", config.noise_edit_steps)):
        if steps and config.step > 0 and not losses:
            raise UsageError(
                f"--{flag}-steps {steps} without a loss", "they follow its gradient", "give a loss a weight"
            )


def require_guided_step(config: GuidanceConfig, steps: int, guided: int) -> None:
    """Raise UsageError where the teacher should guide in a share of the steps, and none of them begins there.

    An empty share, from 1 to 1, says that no step is to be guided. steps, guided: of a run, and how many of them are.
    """
    if config.acts and config.start < config.stop and not guided:
        why = f"none of the {steps} steps begins there, of which step i begins at i / {steps}"
        todo = "take more steps or other shares; --guide-from 1 guides none"
        raise UsageError(f"--guide-from {config.start:g} --guide-to {config.stop:g} cannot act", why, todo)


def require_restart(config: GuidanceConfig, steps: int) -> None:
    """Raise UsageError where images are to be encoded again and no denoising step would follow. steps: of a run."""
    if config.acts and config.reencode and not round(config.reencode_level * steps):
        what = f"--reencode-level {config.reencode_level:g} cannot act"
        why = f"it is less than half of one of the {steps} steps"
        raise UsageError(what, why, f"use {1 / steps:.2g} or more, or take more steps")


@torch.no_grad()
def try_teacher(teacher: Classifier, guidance: Guidance | None, side: int) -> None:
    """Show the guidance two grey images of this side; that the teacher gives logits, `Classifier.tried` has seen.

    Raises UsageError: BatchNorm layers that are not used once, or a loss that fails or is not one number for every
    image.
    """
    if guidance is None:
        return
    grey = torch.full((2, 3, side, side), 0.5, device=teacher.device)
    for own in guidance.of_teachers:
        _try_losses(own, grey)


def _try_losses(guidance: Guidance, grey: torch.Tensor) -> None:
    seen = guidance.seen(grey, guidance.judge(grey)[0].argmax(1))
    for loss in guidance.losses:
        with running(f"the guidance loss {loss.name}"):
            values = loss(seen)
        if not isinstance(values, torch.Tensor) or values.shape != (2,):
            shape = f"the shape {list(values.shape)}" if isinstance(values, torch.Tensor) else "no tensor"
            what = f"the guidance loss {loss.name} has {shape} for two images"
            raise UsageError(what, "a loss is one number for every image", "reduce over all other dimensions")


def build_command(config: GenerateConfig, prior: Prior, teacher: Classifier) -> str:
    """The command that builds the engines of a run with these settings."""
    words = ["--prior", prior.source, *_file_words(prior), *_teacher_words(teacher), *_resize_words(teacher)]
    for name, value in config.changed().items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif name not in _LOCAL:
            words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    own = [] if config.compute.backend == "auto" else ["--backend", config.compute.backend]
    return shlex.join(["dfkd-engines", "build", *own, "--engines", str(config.compute.engines), "--", *words])


def _file_words(prior: Prior) -> list[str]:
    """The flags that choose the prior's files again."""
    flags = {"revision": "--revision", "variant": "--variant", "config": "--prior-config"}
    words = [word for name, flag in flags.items() if prior.files.get(name) for word in (flag, str(prior.files[name]))]
    for name, flag in (("lora", "--lora"), ("textual_inversion", "--textual-inversion")):
        words += [flag, ",".join(prior.files[name])] if prior.files.get(name) else []
    return words + (["--offline"] if prior.files.get("offline") else [])


def _resize_words(teacher: Classifier) -> list[str]:
    """The flag of a way of resizing that the teacher's source does not state."""
    config = config_of(Path(teacher.source)) if teacher.source else None
    stated = read_object(config, {}, "").get("resize") if config is not None and config.exists() else None
    return [] if teacher.resize == (stated or RESIZES[0]) else ["--resize", teacher.resize]


def _teacher_words(teacher: Classifier) -> list[str]:
    """The flags that load a teacher again; TEACHER stands for one that was made from a module in Python, and FILE for a
    file of names that hold commas."""
    if isinstance(teacher, Committee):
        return ["--clients", *(f"{member.name}:{member.weight:g}" for member in teacher.members)]
    if not teacher.source or ":" in teacher.source.partition("/")[0]:
        return ["--teacher", teacher.source] if teacher.source else ["--teacher-checkpoint", "TEACHER"]
    words = ["--teacher-checkpoint", teacher.source]
    if config_of(Path(teacher.source)) is not None:  # a folder, which knows the rest
        return words
    commas = any("," in name for name in teacher.class_names)
    words += ["--teacher", teacher.architecture, "--classes", "@FILE" if commas else ",".join(teacher.class_names)]
    for name, values in {"mean": teacher.mean, "std": teacher.std, "input-size": (teacher.input_size,)}.items():
        words += [f"--teacher-{name}", ",".join(map(str, values))]
    return words
