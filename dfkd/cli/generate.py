"""dfkd-generate: a frozen teacher and a frozen diffusion prior -> labelled synthetic images in shards."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dfkd.cli.options import command, option, plain, save_settings
from dfkd.cli.progress import progress
from dfkd.cli.teacher import NORMALISATIONS, load_teacher
from dfkd.device import resolve_device
from dfkd.errors import UsageError
from dfkd.files import make_writable, replace_text
from dfkd.imagefolder import export_imagefolder
from dfkd.shards import FORMATS, ShardFolder, open_folder, require_space
from dfkd.synthesis.guidance import Guidance, LossWeights
from dfkd.synthesis.memory import device_bytes, images_per_call
from dfkd.synthesis.prompts import chosen_classes, prompt_of
from dfkd.synthesis.run import Synthesis, synthesise
from dfkd.synthesis.sampler import SamplerSettings
from dfkd.synthesis.schedule import SAMPLERS, build_table
from dfkd.synthesis.statistics import BN_LOSSES, tapped
from dfkd.teachers import checkpoint
from dfkd.teachers.classifier import Classifier
from engine.networks import Prior, PriorError, load_prior

COMMAND = "dfkd-generate"
RESULT = "result.json"
IMAGE_FOLDER = "imagefolder"
EMBEDDED_PRIOR = Path(__file__).parents[1] / "priors" / "demo"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP16_LOSS_SCALE = 2.0**10  # lifts gradients of 1e-7, common here, into float16's normal range
SHARD_IMAGES = 256  # about as many images as a shard holds unless --shard-size says otherwise


@dataclass(frozen=True)
class GenerateOptions:
    """Synthesise labelled images: a diffusion prior, steered at every step by the gradient of the teacher's loss.

    Writes OUT/shard-*.tar (WebDataset), OUT/manifest.json, OUT/settings.json and OUT/result.json. Started again on the
    same folder it computes what is missing or damaged and nothing else. The same --seed and image id give the same
    image for any --batch, in any order.
    """

    out: Path = option(MISSING, "folder to write")
    teacher: str | None = option(None, "architecture of the teacher; a folder of dfkd-train-teacher knows its own")
    teacher_checkpoint: Path | None = option(None, "folder of dfkd-train-teacher, or a .safetensors, .pth or .pt file")
    normalisation: str | None = option(
        None, "mean and standard deviation for a teacher file that states none", choices=tuple(NORMALISATIONS)
    )
    classes: tuple[str, ...] = option((), "class names in the order of the teacher's logits, where it states none")
    only: tuple[str, ...] = option((), "synthesise these classes alone")
    prior: str = option(
        str(EMBEDDED_PRIOR), "folder in Stable Diffusion layout, or the id of one on the Hugging Face hub"
    )
    count: int = option(1000, "how many images", unit="images", low=1)
    batch: int = option(64, "images in flight, at most a group; no result depends on it", unit="images", low=1)
    micro_batch: int = option(0, "images per network call; 0: as many as --batch, group and memory allow", low=0)
    group: int = option(64, "images that share BN statistics and CutMix partners", unit="images", low=1)
    seed: int = option(0, "run seed; with the image id it fixes an image", low=0, high=2**64 - 1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto takes a GPU where there is one")
    dtype: str = option("fp32", "precision of the networks; latents and losses stay fp32", choices=tuple(DTYPES))
    size: int = option(0, "height and width; 0: the prior's own", unit="pixels", low=0)
    sampler: str = option("ddim", "sampler", choices=tuple(SAMPLERS))
    steps: int = option(50, "denoising steps", low=1, high=1000)
    cfg: float = option(3.0, "classifier-free scale; 1: the prompt alone", low=0)
    cfg_from: float = option(0.0, "share of the steps after which it acts", low=0, high=1)
    cfg_to: float = option(1.0, "share of the steps until which it acts", low=0, high=1)
    prompt: str = option("a photo of the digit {label}", "template; without {label} it is class-free")
    negative_prompt: str = option("", "prompt of the unconditional rows")
    gradient: str = option(
        "latent",
        "latent: the gradient stops at the clean latent, one UNet call a step; unet: it goes through the UNet, two"
        " calls and a backward pass (published)",
        choices=("latent", "unet"),
    )
    guidance_step: float = option(0.2, "length of a guidance step; 0: no teacher at all, no refinement either", low=0)
    guidance_repeats: int = option(1, "guidance steps at every denoising step", low=1)
    guidance_norm: str = option(
        "rms", "rms: gradient divided by its root mean square, per image; none: as it is", choices=("rms", "none")
    )
    guide_from: float = option(0.0, "share of the steps after which the teacher guides", low=0, high=1)
    guide_to: float = option(1.0, "share of the steps until which the teacher guides", low=0, high=1)
    bn_weight: float = option(0.1, "weight of the BatchNorm-statistics loss", low=0)
    cls_weight: float = option(1.0, "weight of the cross-entropy", low=0)
    adv_weight: float = option(0.0, "weight of the adversarial loss; needs --student-checkpoint", low=0)
    bn_stats: str = option(
        "group", "statistics of every image alone, or of its whole group", choices=("image", "group")
    )
    bn_loss: str = option(
        "norm", "norm: un-squared 2-norms (published); relative: free of each layer's scale", choices=BN_LOSSES
    )
    cutmix_every: int = option(0, "Latent CutMix after every so many steps; 0: never", low=0)
    cutmix_alpha: float = option(1.0, "its Beta(alpha, alpha)", low=1e-3)
    noise_edit_steps: int = option(0, "gradient steps of the BN loss on the initial noise (FedCADO)", low=0)
    noise_edit_scale: float = option(0.1, "their length", low=0)
    refine_steps: int = option(0, "guidance steps on the finished image's pixels; needs guidance", low=0)
    refine_step: float = option(0.02, "rms of the first of them, of pixels in 0..1, falling to 0", low=0, high=1)
    student_checkpoint: Path | None = option(None, "student of the adversarial loss: OUT/last of dfkd-distill")
    shard_size: int = option(0, f"images a shard, a multiple of --group; 0: about {SHARD_IMAGES}", low=0)
    format: str = option(
        "webdataset", "imagefolder: also class folders, under OUT/imagefolder", choices=("webdataset", "imagefolder")
    )
    image_format: str = option("png", "file format of the images", choices=FORMATS)

    def __post_init__(self) -> None:
        for name, low, high in (
            ("cfg", self.cfg_from, self.cfg_to),
            ("guide", self.guide_from, self.guide_to),
        ):
            if low > high:
                raise ValueError(f"--{name}-from {low} lies after --{name}-to {high}")
        if self.shard_size % self.group:
            raise ValueError(f"--shard-size {self.shard_size} is not a multiple of --group {self.group}")
        if self.adv_weight and self.student_checkpoint is None:
            raise ValueError("--adv-weight above 0 needs --student-checkpoint, the student that should disagree")
        if self.student_checkpoint is not None and not self.adv_weight:
            raise ValueError("--student-checkpoint acts only with --adv-weight above 0")
        if self.noise_edit_steps and not self.guides:
            raise ValueError("--noise-edit-steps needs guidance: --guidance-step above 0 and a loss of weight above 0")
        if self.refine_steps and self.guidance_step > 0 and not self.guides:
            raise ValueError("--refine-steps needs a loss of weight above 0")

    @property
    def guides(self) -> bool:
        return self.guidance_step > 0 and max(self.bn_weight, self.cls_weight, self.adv_weight) > 0

    @property
    def images_per_shard(self) -> int:
        return self.shard_size or self.group * math.ceil(SHARD_IMAGES / self.group)


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
        prior = load_prior(options.prior, DTYPES[options.dtype], device)
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
    value = DTYPES[options.dtype].itemsize
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
