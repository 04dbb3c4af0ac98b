"""dfkd-generate: a frozen teacher and a frozen diffusion prior -> labelled synthetic images in shards."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from dfkd.cli.generate_options import GenerateOptions
from dfkd.cli.options import command, plain, save_settings
from dfkd.cli.progress import progress
from dfkd.cli.teacher import load_teacher
from dfkd.device import resolve_device
from dfkd.errors import UsageError
from dfkd.files import make_writable, replace_text
from dfkd.imagefolder import export_imagefolder
from dfkd.shards import ShardFolder, open_folder, require_space
from dfkd.synthesis.guidance import Guidance, LossWeights
from dfkd.synthesis.memory import device_bytes, images_per_call
from dfkd.synthesis.prompts import chosen_classes, prompt_of
from dfkd.synthesis.run import Synthesis, synthesise
from dfkd.synthesis.sampler import SamplerSettings
from dfkd.synthesis.schedule import build_table
from dfkd.synthesis.statistics import tapped
from dfkd.teachers import checkpoint
from dfkd.teachers.classifier import Classifier
from engine.networks import Prior, PriorError, load_prior

COMMAND = "dfkd-generate"
RESULT = "result.json"
IMAGE_FOLDER = "imagefolder"
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP16_LOSS_SCALE = 2.0**10  # lifts gradients of 1e-7, common here, into float16's normal range


# What decides where and in which portions a run is computed, and not what comes out.
_NOT_IDENTITY = (
    *("out", "batch", "micro_batch", "device", "format", "count", "image_format", "shard_size"),
    *("teacher", "teacher_checkpoint", "student_checkpoint", "prior", "classes"),
)


def on_device(classifier: Classifier, device: torch.device) -> Classifier:
    """Frozen, in evaluation mode and channels_last; BatchNorm teachers keep float32 (their statistics are the loss)."""
    classifier.module.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return classifier


def load_student(options: GenerateOptions, teacher: Classifier, device: torch.device) -> Classifier | None:
    if options.student_checkpoint is None:
        return None
    student = on_device(checkpoint.load(None, options.student_checkpoint), device)
    if student.class_names != teacher.class_names:
        raise UsageError(
            f"{options.student_checkpoint} has {len(student.class_names)} classes that are not the teacher's",
            f"the teacher has {len(teacher.class_names)}",
            "give a student distilled from this teacher",
        )
    return student


def latent_size(options: GenerateOptions, prior: Prior) -> tuple[int, int]:
    if not options.size:
        if len(set(prior.latent_size)) > 1:
            raise UsageError(f"the prior's latents are {prior.latent_size}", "images are square here", "give --size")
        return prior.latent_size
    if options.size % prior.vae_scale_factor:
        raise UsageError(
            f"--size {options.size} does not fit the prior",
            f"its decoder enlarges latents {prior.vae_scale_factor} times",
            f"choose a multiple of {prior.vae_scale_factor}",
        )
    return (options.size // prior.vae_scale_factor,) * 2


@torch.no_grad()
def try_teacher(
    teacher: Classifier, options: GenerateOptions, guidance: Guidance | None, size: int, device: torch.device
) -> None:
    """Show the teacher one grey image. Raises UsageError for what would fail later."""
    if options.noise_edit_steps and not teacher.batch_norms():
        raise UsageError(
            f"teacher {teacher.architecture} has no BatchNorm layer", "--noise-edit-steps descends their loss"
        )
    try:
        with tapped(guidance.layers if guidance else ()):
            logits = teacher.logits(torch.full((1, 3, size, size), 0.5, device=device))
    except ValueError as error:
        raise UsageError(str(error), todo="use --bn-weight 0 for this teacher") from None
    if logits.shape != (1, len(teacher.class_names)):
        raise UsageError(
            f"teacher {teacher.architecture} gives {logits.shape[-1]} logits",
            f"there are {len(teacher.class_names)} class names",
            "name every logit with --classes",
        )


def prepare(options: GenerateOptions) -> Synthesis:
    """Load and check all that a run needs. Raises UsageError."""
    device = resolve_device(options.device)
    if options.teacher_checkpoint is None and options.teacher is None:
        raise UsageError(
            "no teacher", "labels and guidance come from it", "give --teacher-checkpoint, or --teacher too"
        )
    teacher = on_device(
        load_teacher(options.teacher, options.teacher_checkpoint, options.normalisation, options.classes), device
    )
    if options.classes and options.classes != teacher.class_names:
        raise UsageError(
            f"--classes names {len(options.classes)} classes: {', '.join(options.classes[:10])}",
            f"the teacher has {len(teacher.class_names)}: {', '.join(teacher.class_names[:10])}",
            "leave --classes out, or give the teacher's in its order",
        )
    classes = chosen_classes(teacher.class_names, options.only)
    prompt_of(options.prompt, teacher.class_names[0])
    student = load_student(options, teacher, device)
    try:
        prior = load_prior(options.prior, TORCH_DTYPES[options.dtype], device)
    except PriorError as error:
        raise UsageError(str(error)) from None
    guidance = None
    if options.guides:
        weights = LossWeights(
            options.bn_weight, options.cls_weight, options.adv_weight, options.bn_stats, options.bn_loss
        )
        scale = FP16_LOSS_SCALE if options.dtype == "fp16" else 1.0
        try:
            guidance = Guidance(prior.decode, teacher, weights, student, scale)
        except ValueError as error:
            raise UsageError(str(error), todo="use --bn-weight 0 for this teacher") from None
    size = latent_size(options, prior)
    try_teacher(teacher, options, guidance, size[0] * prior.vae_scale_factor, device)
    names = SamplerSettings.__dataclass_fields__
    return Synthesis(
        prior=prior,
        teacher=teacher,
        guidance=guidance,
        table=build_table(prior.scheduler_config, options.sampler, options.steps),
        settings=SamplerSettings(**{name: getattr(options, name) for name in names}),
        seed=options.seed,
        classes=classes,
        group=options.group,
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        latent_size=size,
        device=device,
    )


def identity(options: GenerateOptions, synthesis: Synthesis) -> dict[str, Any]:
    """What a run's pixels follow from, as plain JSON values; a folder takes no others."""
    chosen = {name: value for name, value in asdict(options).items() if name not in _NOT_IDENTITY}
    student = synthesis.guidance.student if synthesis.guidance else None
    chosen |= {
        "prior_digest": synthesis.prior.weights_digest,
        "prior_scaling_factor": synthesis.prior.scaling_factor,
        "scheduler": {k: v for k, v in synthesis.prior.scheduler_config.items() if k != "_diffusers_version"},
        "teacher_digest": synthesis.teacher.digest(),
        "student_digest": student.digest() if student else None,
        "size": synthesis.latent_size[0] * synthesis.prior.vae_scale_factor,
    }
    result: dict[str, Any] = plain(chosen)
    return result


def choose_micro(options: GenerateOptions, synthesis: Synthesis) -> int:
    """Images per network call."""
    most = min(options.batch, options.group)
    if options.micro_batch:
        return min(options.micro_batch, most)
    pixels = math.prod(synthesis.latent_size) * synthesis.prior.vae_scale_factor**2
    width = int(synthesis.prior.decoder_width)
    value = TORCH_DTYPES[options.dtype].itemsize
    return min(most, images_per_call(pixels, width, value, device_bytes(synthesis.device)))


def quieten_libraries() -> None:
    """No bars and hints of the libraries that load the networks; their errors still come through."""
    # Imported here and not above: they take seconds to load, which --help and a wrong option need not wait for.
    import diffusers
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    disable_progress_bars()


def run(options: GenerateOptions) -> dict[str, Any]:
    """Check, synthesise what is missing, write OUT/result.json."""
    make_writable(options.out)
    if not sys.stderr.isatty():
        quieten_libraries()
    synthesis = prepare(options)
    size = synthesis.latent_size[0] * synthesis.prior.vae_scale_factor
    micro = choose_micro(options, synthesis)
    with ShardFolder.create_or_open(
        options.out,
        identity(options, synthesis),
        synthesis.teacher.class_names,
        size,
        options.image_format,
        options.count,
        options.images_per_shard,
    ) as folder:
        remaining = sum(len(folder.layout.ids(index)) for index in folder.missing())
        copies = options.count if options.format == "imagefolder" else 0
        require_space(options.out, remaining + copies, size, options.image_format)
        save_settings(options, options.out, COMMAND)
        dropped = -options.count % options.group if folder.missing() else 0
        print(
            f"{options.count} images of {size}x{size}, {remaining} to compute on {synthesis.device} in {options.dtype};"
            f" groups of {options.group}, {micro} images a network call"
            + (f"; {dropped} more complete the last group and are dropped" if dropped else ""),
            file=sys.stderr,
        )
        with progress(remaining, "synthesis", "img") as bar:
            try:
                done = synthesise(folder, synthesis, micro, bar.update)
            except FloatingPointError as error:
                raise UsageError(str(error), todo="lower --guidance-step, or use --dtype fp32") from None
    if options.format == "imagefolder":
        export_imagefolder(options.out, options.out / IMAGE_FOLDER)
    result = {
        "out": options.out,
        "images": options.count,
        "images_written": done.images,
        "shards_written": done.shards,
        "shards_before": done.shards_before,
        "seconds": round(done.seconds, 3),
        "images_per_second": round(done.images / done.seconds, 3) if done.images else None,
        "micro_batch": micro,
        "class_names": synthesis.teacher.class_names,
        "class_counts": torch.bincount(
            open_folder(options.out).labels, minlength=len(synthesis.teacher.class_names)
        ).tolist(),
    }
    replace_text(options.out / RESULT, json.dumps(plain(result), indent=1, sort_keys=True) + "\n")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    sys.exit(command(GenerateOptions, run, COMMAND, argv))
