"""From the options of dfkd-generate to loaded and checked networks, before any work."""

import torch

from dfkd.cli.generate_options import GenerateOptions
from dfkd.cli.teacher import load_teacher
from dfkd.runtime import resolve_device
from dfkd.errors import UsageError
from dfkd.synthesis.guidance import Guidance, LossWeights
from dfkd.synthesis.prompts import chosen_classes, prompt_of
from dfkd.synthesis.run import Synthesis
from dfkd.synthesis.sampler import SamplerSettings
from dfkd.synthesis.schedule import build_table
from dfkd.teachers import checkpoint
from dfkd.teachers.classifier import Classifier
from dfkd_engine.attention import choose_attention, set_attention
from dfkd_engine.errors import EngineError
from dfkd_engine.group_norms import set_group_norms
from dfkd_engine.networks import Prior, load_prior
from dfkd_engine.prior_folder import PriorError

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP16_LOSS_SCALE = 2.0**10  # lifts gradients of 1e-7, common here, into float16's normal range


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
        grey = torch.full((1, 3, size, size), 0.5, device=device)
        logits = guidance.taught(grey)[0] if guidance else teacher.logits(grey)
    except ValueError as error:
        raise UsageError(str(error), todo="use --bn-weight 0 for this teacher") from None
    if logits.shape != (1, len(teacher.class_names)):
        raise UsageError(
            f"teacher {teacher.architecture} gives {logits.shape[-1]} logits",
            f"there are {len(teacher.class_names)} class names",
            "name every logit with --classes",
        )


def load_networks(options: GenerateOptions, device: torch.device, kernels: str = "torch") -> Prior:
    """The prior in --dtype on the device, with the attention that is asked for; kernels: see `prepare`.

    Raises UsageError.
    """
    dtype = TORCH_DTYPES[options.dtype]
    # fp32 is meant: TF32, cuDNN's default, keeps 10 bits of a factor, and images would differ between devices.
    torch.backends.cudnn.allow_tf32 = False
    try:
        attention = choose_attention(options.attention, device, dtype)
        prior = load_prior(options.prior, dtype, device)
        for network in (prior.unet, prior.vae):
            set_attention(network, attention.name)
            set_group_norms(network, kernels)
    except (PriorError, EngineError) as error:
        raise UsageError(error.what, error.why, error.todo) from None
    return prior


def loss_scale(options: GenerateOptions) -> float:
    return FP16_LOSS_SCALE if options.dtype == "fp16" else 1.0


def prepare(options: GenerateOptions, kernels: str = "torch") -> Synthesis:
    """Load and check all that a run needs; kernels, "torch" or "triton", is what runs it. Raises UsageError."""
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
    prior = load_networks(options, device, kernels)
    guidance = None
    if options.guides:
        weights = LossWeights(
            options.bn_weight, options.cls_weight, options.adv_weight, options.bn_stats, options.bn_loss
        )
        try:
            guidance = Guidance(prior.decode, teacher, weights, student, loss_scale(options), kernels=kernels)
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
        kernels=kernels,
    )
