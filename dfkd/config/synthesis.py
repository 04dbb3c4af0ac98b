"""Settings of synthesis: whose teacher, how images are sampled and guided, how much a call holds, what runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfkd.config.fields import Config, nested, option
from dfkd.config.selection import CandidatesConfig, FilterConfig

DTYPES = ("fp32", "bf16", "fp16")
BACKENDS = ("inductor", "onnxruntime", "tensorrt", "tensorrt-rtx", "torch-tensorrt")  # of engines on disk
QUANTISING_BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")  # those that take 8-bit graphs
SAMPLERS = ("ddpm", "ddim", "euler", "euler-ancestral", "dpmpp2m", "lcm")
ADVERSARIAL_METHODS = ("deepinversion", "fast", "cmi", "generative")  # with an adv_weight among their own settings
METHODS = ("guided", *ADVERSARIAL_METHODS, "folder", "noise")
IMAGE_FORMATS = ("png", "jpg", "npy")
ADV_LOSSES = ("kl", "entropy", "reference")
RESIZES = ("antialias", "published")  # how a network is shown images that are larger than its own
SHARD_IMAGES = 256  # about as many images as a shard holds unless --shard-size says otherwise

Channels = tuple[float, float, float]
# Mean and standard deviation of the channels, of images in 0..1.
NORMALISATIONS: dict[str, tuple[Channels, Channels]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "domainnet": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def channel_fault(mean: Sequence[float], std: Sequence[float]) -> str | None:
    """What no mean or standard deviation of images in 0..1 can be, in words; None where nothing is wrong."""
    if any(not 0 <= value <= 1 for value in mean):
        return f"mean {', '.join(map(str, mean))}"
    return f"std {', '.join(map(str, std))}" if any(not 0 < value <= 5 for value in std) else None


@dataclass(frozen=True, kw_only=True)
class PriorFilesConfig(Config):
    """Files of the prior"""

    EXAMPLE = "--prior OWNER/NAME --revision main --variant fp16 --offline"

    revision: str | None = option(
        None, "of a hub id: branch, tag or commit; none is its main branch, as it is that day", identity=False
    )
    variant: str | None = option(
        None,
        "which weights where a prior has several sets side by side, such as fp16; none is the plain one",
        identity=False,
    )
    offline: bool = option(False, "take a hub id from the local cache alone, and fetch nothing", identity=False)
    config: str | None = option(
        None,
        "of a single-file checkpoint: folder or hub id of a pipeline of the same kind, for configs and tokenizer",
        flag="prior_config",
        identity=False,
    )

    def files(self) -> dict[str, Any]:
        """These settings as keywords of `Prior.from_pretrained`; the first four are those of PriorSource."""
        names = ("revision", "variant", "offline", "config", "lora", "textual_inversion")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}


@dataclass(frozen=True, kw_only=True)
class PriorConfig(PriorFilesConfig):
    """Prior: which diffusion model, and which of its files"""

    source: str = option(
        "demo",
        "demo (the embedded one), a folder in diffusers' layout, the id of one on the Hugging Face hub, or a checkpoint"
        " in a single file",
        flag="prior",
        identity=False,
    )
    lora: tuple[str, ...] = option(
        (), "LoRA weights to fuse into the networks: FILE_OR_FOLDER[:SCALE], safetensors", identity=False
    )
    textual_inversion: tuple[str, ...] = option(
        (), "words to add, which the prompt may use: FILE[:TOKEN], safetensors", identity=False
    )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Config):
    """Teacher: which classifier, and what it is fed"""

    EXAMPLE = "--teacher timm:resnet50 --teacher-input-size 224"

    teacher: str | None = option(
        None,
        "architecture: a name of the zoo, timm:NAME, torchvision:NAME, transformers:FOLDER_OR_ID or"
        " file:PATH.py:FUNCTION; a folder of dfkd-train-teacher knows its own",
    )
    checkpoint: Path | None = option(
        None, "folder of dfkd-train-teacher, timm or transformers, or a weight file", flag="teacher_checkpoint"
    )
    clients: tuple[str, ...] = option(
        (),
        "several teachers instead: FOLDER[:WEIGHT] of each, as --teacher-checkpoint; their classes are matched by name",
    )
    normalisation: str | None = option(
        None, "mean and standard deviation for a teacher file that states none", choices=tuple(NORMALISATIONS)
    )
    mean: tuple[float, ...] | None = option(
        None, "mean per channel instead, of images in 0..1; none: 0,0,0", flag="teacher_mean", none=(0, 0, 0)
    )
    std: tuple[float, ...] | None = option(
        None, "standard deviation per channel instead; none: 1,1,1", flag="teacher_std", none=(1, 1, 1)
    )
    input_size: int | None = option(
        None,
        "side of the teacher's images, instead of what its source states; a weight file of another library states none",
        unit="pixels",
        low=1,
        flag="teacher_input_size",
    )
    resize: str | None = option(
        None,
        "how it is shown larger images; antialias: each pixel counts; published: 16 for each new one, as in the"
        " published guidance; none: as its folder says, else antialias",
        choices=RESIZES,
    )
    classes: tuple[str, ...] = option(
        (),
        "class names in the order of the teacher's logits, where it states none; @FILE: one a line, or JSON, or TOML;"
        " @cifar10, @cifar100, @tiny-imagenet, @imagenet, @domainnet",
    )

    def validate(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != 3:
                raise ValueError(f"teacher_{name} has {len(values)} numbers: it must be three, one a channel")
            if values is not None and self.normalisation is not None:
                raise ValueError(f"teacher_{name} and normalisation are both given: leave one out")
        alone = ("teacher", "teacher_checkpoint", "normalisation", "teacher_mean", "teacher_std", "teacher_input_size")
        if self.clients and (given := [name for name in (*alone, "classes") if name in self.changed()]):
            flag = "--" + given[0].replace("_", "-")
            raise ValueError(f"{flag} is of one teacher, and --clients names several: leave one of the two out")
        for text in self.clients:
            self.client(text)
        if (fault := channel_fault(self.mean or (), self.std or ())) is not None:
            raise ValueError(f"teacher_{fault} is not of images in 0..1: divide those of 0..255 by 255")

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the teacher, or each of several, lies; () where it has no weights of its own."""
        own = () if self.checkpoint is None else (str(self.checkpoint),)
        return own + tuple(self.client(text)[0] for text in self.clients)

    @staticmethod
    def client(text: str) -> tuple[str, float]:
        """Source and weight of a client, 1 where none is given. Raises ValueError: a weight that is none."""
        source, _, weight = text.rpartition(":")
        try:
            found = float(weight)
        except ValueError:
            return text, 1.0
        if not source or not 0 < found < float("inf"):
            raise ValueError(f"--clients {text}: FOLDER or FOLDER:WEIGHT is wanted, with a weight above 0")
        return source, found


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Config):
    """Sampling: from noise to an image"""

    EXAMPLE = '--sampler ddim --steps 20 --cfg 3 --prompt "a photo of a {label}"'

    sampler: str = option("ddim", "sampler", choices=SAMPLERS, extensible=True)
    steps: int = option(50, "denoising steps", low=1, high=1000)
    cfg: float | None = option(
        None, "classifier-free guidance scale; up to 1: the prompt alone; none: 3, where the prior knows it", low=0
    )
    cfg_from: float = option(0.0, "share of the steps after which it acts", low=0, high=1)
    cfg_to: float = option(1.0, "share of the steps until which it acts", low=0, high=1)
    prompt: str | None = option(
        None, "template; without {label} it is class-free; none: the prior's own, or 'a photo of a {label}'"
    )
    negative_prompt: str = option("", "prompt of the unconditional rows")
    size: int = option(0, "height and width; 0: the prior's own", unit="pixels", low=0)
    only: tuple[str, ...] = option((), "synthesise these classes alone")
    class_words: int = option(
        0,
        "gradient steps of the teacher's losses in which a word is learned for each class before the first image, to"
        " stand for {label}; 0: the classes' names",
        unit="steps",
        low=0,
    )
    keep_intermediates: int = option(
        0,
        "clean estimates along each trajectory, at evenly spaced steps, that are images of their own beside its last",
        unit="images",
        low=0,
    )

    def validate(self) -> None:
        if self.class_words and self.prompt is not None and "{label}" not in self.prompt:
            raise ValueError(f"--class-words {self.class_words} with --prompt {self.prompt!r}: it names no {{label}}")
        if self.keep_intermediates >= self.steps:
            raise ValueError(
                f"--keep-intermediates {self.keep_intermediates} needs more steps than --steps {self.steps}"
            )
        if self.cfg_from > self.cfg_to:
            raise ValueError(f"--cfg-from {self.cfg_from} lies after --cfg-to {self.cfg_to}")

    def cfg_acts(self, step: int, cfg: float) -> bool:
        """Whether the scale `cfg` moves the prediction at denoising step `step`, counted from 0: above 1, as in
        diffusers."""
        return cfg > 1 and self.cfg_from <= step / self.steps < self.cfg_to


@dataclass(frozen=True, kw_only=True)
class ViewConfig(Config):
    """Views: how the images that guide are moved and recoloured, anew for every gradient and image"""

    EXAMPLE = "--guide-shift 4 --guide-flip"

    shift: int = option(
        0, "shift by up to so many, mirrored at the edges", unit="pixels of the teacher", low=0, flag="guide_shift"
    )
    flip: bool = option(False, "mirror one in two; not where left and right differ, as in digits", flag="guide_flip")
    crop: float = option(
        1.0, "least share of the side that is cut out and enlarged; 1: all of it", low=0.1, high=1, flag="guide_crop"
    )
    colour: float = option(
        0.0, "brightness, contrast and saturation times 1 - it to 1 + it", low=0, high=1, flag="guide_colour"
    )

    @property
    def acts(self) -> bool:
        """Whether the teacher sees anything else than the images as they are."""
        return self.shift > 0 or self.flip or self.crop < 1 or self.colour > 0


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig(Config):
    """Guidance: how the teacher's losses steer the samples"""

    EXAMPLE = "--guidance-step 0.12 --bn-weight 10 --bn-loss relative --guide-from 0.66"

    teaching: str = option(
        "joint",
        "of several --clients, joint: an image is guided by all that know its class, weighted; each: by one, the groups"
        " in turn, about its own classes (FedCADO)",
        choices=("joint", "each"),
    )
    gradient: str = option(
        "latent",
        "latent: the gradient stops at the clean latent, one UNet call a step; unet: it goes through the UNet, two"
        " calls and a backward pass (published)",
        choices=("latent", "unet"),
    )
    step: float = option(
        0.2,
        "length of a guidance step; 0: no teacher at all, and none of the options here acts",
        low=0,
        flag="guidance_step",
    )
    step_trials: int = option(
        0,
        "lengths tried on a few images before a run, each twice the one before, --guidance-step in their middle; taken"
        " is the one whose images the teacher reads best under other views; 0: --guidance-step as it is",
        unit="trials",
        low=0,
        high=20,
    )
    power: float = option(
        0.0,
        "length times (noise share)^it; the share is sigma of z = alpha z0 + sigma eps, the time of a rectified flow",
        low=0,
        high=4,
        flag="guidance_power",
    )
    repeats: int = option(1, "guidance steps at every denoising step", low=1, flag="guidance_repeats")
    decoder: str | None = option(
        None,
        "decoder that the gradient goes through instead of the prior's own, which still draws the image: a folder of"
        " dfkd-train-decoder, or a folder or hub id of an AutoencoderTiny for the same latents",
        flag="guidance_decoder",
        identity=False,
    )
    norm: str = option(
        "rms",
        "rms: gradient divided by its root mean square, per image; none: as it is",
        choices=("rms", "none"),
        flag="guidance_norm",
    )
    start: float = option(0.0, "share of the steps after which the teacher guides", low=0, high=1, flag="guide_from")
    stop: float = option(1.0, "share of the steps until which the teacher guides", low=0, high=1, flag="guide_to")
    bn_weight: float = option(0.1, "weight of the BatchNorm-statistics loss", low=0)
    cls_weight: float = option(1.0, "weight of the cross-entropy", low=0)
    adv_weight: float = option(0.0, "weight of the adversarial loss; needs --student-checkpoint", low=0)
    tv_weight: float = option(0.0, "weight of the total variation, the mean difference of neighbouring pixels", low=0)
    joint_temperature: float = option(
        1.0, "factor of the label's logit, and of all logits, in the cross-entropy (EluCD)", low=0.01
    )
    margin_discount: float = option(
        1.0, "factor more of all logits in its log-sum-exp; 0: the label's logit alone (EluCD: 0.5)", low=0, high=1
    )
    softplus_beta: float = option(
        0.0, "the gradient passes the teacher's ReLUs as those of softplus of this beta (EluCD: 3 to 5); 0: off", low=0
    )
    adv_loss: str = option(
        "kl",
        "kl: divergence from the teacher where both agree (published); entropy: of the student; reference: the"
        " student's cross-entropy less --adv-reference times the teacher's",
        choices=ADV_LOSSES,
    )
    adv_reference: float = option(1.0, "weight of the teacher's cross-entropy in --adv-loss reference", low=0)
    adv_clamp: float = option(
        0.0, "value of the adversarial loss above which an image gets no more of it; 0: none", low=0
    )
    bn_stats: str = option(
        "group", "statistics of every image alone, or of its whole group", choices=("image", "group")
    )
    bn_loss: str = option(
        "norm",
        "norm: un-squared 2-norms (published); relative: free of each layer's scale",
        choices=("norm", "relative"),
    )
    losses: tuple[str, ...] = option(
        (), "losses of your own beside these, each FILE.py:CLASS(weight=0.1, ...)", flag="loss"
    )
    noise_edit_steps: int = option(0, "gradient steps of the BN loss on the initial noise (FedCADO)", low=0)
    noise_edit_scale: float = option(0.1, "their length", low=0)
    refine_steps: int = option(0, "guidance steps on the finished image's pixels; needs guidance", low=0)
    refine_step: float = option(0.02, "rms of the first of them, of pixels in 0..1, falling to 0", low=0, high=1)
    refine_smooth: float = option(
        0.0, "deviation of the Gaussian that smooths their gradient; 0: off", unit="pixels", low=0, high=16
    )
    reencode: int = option(
        0, "times that the finished image is encoded, noised, denoised with guidance and refined again", low=0, high=100
    )
    reencode_level: float = option(0.3, "share of the denoising steps that each of them takes", low=0.001, high=1)
    view: ViewConfig = nested(ViewConfig)

    def validate(self) -> None:
        if self.start > self.stop:
            raise ValueError(f"--guide-from {self.start} lies after --guide-to {self.stop}")
        for flag, changed, acts, needed in (
            ("--adv-loss", self.adv_loss != "kl", self.adv_weight > 0, "--adv-weight above 0"),
            ("--adv-clamp", self.adv_clamp > 0, self.adv_weight > 0, "--adv-weight above 0"),
            ("--adv-reference", self.adv_reference != 1, self.adv_loss == "reference", "--adv-loss reference"),
            ("--joint-temperature", self.joint_temperature != 1, self.cls_weight > 0, "--cls-weight above 0"),
            ("--margin-discount", self.margin_discount != 1, self.cls_weight > 0, "--cls-weight above 0"),
            ("--refine-smooth", self.refine_smooth > 0, self.refine_steps > 0, "--refine-steps above 0"),
            ("--reencode-level", self.reencode_level != 0.3, self.reencode > 0, "--reencode above 0"),
        ):
            if changed and not acts:
                raise ValueError(f"{flag} needs {needed}: it does not act otherwise")
        if self.step_trials == 1:
            raise ValueError("--step-trials 1 has nothing to choose from: use 3 or 5, or leave it out")
        if self.noise_edit_steps and not self.step:
            raise ValueError("--noise-edit-steps needs guidance: --guidance-step above 0")

    @property
    def acts(self) -> bool:
        """Whether a teacher guides at all."""
        return self.step > 0 and bool(max(self._weights) > 0 or self.losses)

    @property
    def _weights(self) -> tuple[float, ...]:
        return self.bn_weight, self.cls_weight, self.adv_weight, self.tv_weight


@dataclass(frozen=True, kw_only=True)
class CutMixConfig(Config):
    """Latent CutMix: boxes pasted from another image of the class"""

    EXAMPLE = "--cutmix-every 10 --cutmix-repair 2"

    every: int = option(0, "at every so many steps, but not at the last; 0: never", low=0, flag="cutmix_every")
    form: str = option(
        "paper",
        "paper: after the step, lam ~ Beta(alpha, alpha); code: as the published program has it, before the step's UNet"
        " call, lam ~ Beta(u, u) of a u ~ Beta(alpha, alpha)",
        choices=("paper", "code"),
        flag="cutmix_as",
    )
    alpha: float = option(1.0, "its Beta(alpha, alpha)", low=1e-3, flag="cutmix_alpha")
    mix: str = option(
        "box",
        "box: pasted; mixup: whole latents lam to 1 - lam, at the noise's own variance",
        choices=("box", "mixup"),
        flag="cutmix_mix",
    )
    repair: int = option(
        0,
        "times that the box, or what mixup mixed, is noised back by a step and denoised again (RePaint)",
        low=0,
        high=1000,
        flag="cutmix_repair",
    )

    def validate(self) -> None:
        for flag, given in (("mix", self.mix != "box"), ("repair", self.repair > 0)):
            if given and not self.every:
                raise ValueError(f"--cutmix-{flag} needs Latent CutMix: --cutmix-every above 0")


@dataclass(frozen=True, kw_only=True)
class BatchingConfig(Config):
    """Batching: how many images a call holds, and which images interact"""

    EXAMPLE = "--batch 512 --group 64"

    batch: int = option(
        64,
        "images per network call, fewer where memory is short; whole groups are packed into a call",
        unit="images",
        low=1,
        identity=False,
    )
    group: int = option(
        64, "images that interact: BN statistics with --bn-stats group, CutMix partners", unit="images", low=1
    )


@dataclass(frozen=True, kw_only=True)
class ComputeConfig(Config):
    """Compute: where and with what; it decides rounding alone"""

    EXAMPLE = "--device cuda --dtype bf16 --backend auto"

    device: str = option("auto", "auto (a GPU where there is one), cpu, cuda or cuda:N", identity=False)
    threads: int = option(
        0,
        "threads of a process on the CPU; 0: OMP_NUM_THREADS, under torchrun all cores of the machine",
        low=0,
        identity=False,
    )
    dtype: str = option("fp32", "precision of the networks; latents and losses stay fp32", choices=DTYPES)
    backend: str = option(
        "auto",
        "what runs the networks: eager; an engine built by dfkd-engines; auto: of these the one measured quickest",
        choices=("auto", "eager", *BACKENDS),
        extensible=True,
        identity=False,
    )
    engines: Path = option(Path("build/engines"), "folder of the engines", identity=False)
    quantise: str = option(
        "none",
        "8-bit UNet, an engine that dfkd-engines built with the same option; decoder, teacher and gradient stay in"
        " --dtype",
        choices=("none", "int8", "fp8"),
        identity=False,
    )
    attention: str = option(
        "auto",
        "attention of networks that run eagerly; auto: xformers where it can run",
        choices=("auto", "sdpa", "xformers"),
        identity=False,
    )
    kernels: str = option(
        "auto",
        "what runs the guided step, the adversarial loss and, where networks run eagerly, group norms and BatchNorm"
        " with its statistics: Triton, or PyTorch; auto: triton on a GPU",
        choices=("auto", "triton", "torch"),
        identity=False,
    )

    def validate(self) -> None:
        if (
            self.quantise != "none"
            and self.backend not in ("auto", *QUANTISING_BACKENDS)
            and ".py:" not in self.backend
        ):
            able = ", ".join(QUANTISING_BACKENDS)
            raise ValueError(
                f"--quantise {self.quantise} cannot run on --backend {self.backend}: 8-bit networks run as engines of"
                f" {able}; name one of them, or auto"
            )


@dataclass(frozen=True, kw_only=True)
class ShardConfig(Config):
    """Output: how images are stored"""

    EXAMPLE = "--image-format jpg --shard-size 512"

    shard_size: int = option(
        0, f"images a shard, whole groups; 0: about {SHARD_IMAGES}, whole calls", low=0, identity=False
    )
    image_format: str = option("png", "file format of the images", choices=IMAGE_FORMATS, identity=False)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Config):
    """Everything that a synthesis follows from, but the prior, the teacher, the seed and the ids."""

    SECTION = "generate"

    method: str = option(
        "guided",
        "synthesizer, with settings of its own in parentheses: deepinversion(steps=200)",
        choices=METHODS,
        extensible=True,
    )
    sampling: SamplingConfig = nested(SamplingConfig)
    guidance: GuidanceConfig = nested(GuidanceConfig)
    cutmix: CutMixConfig = nested(CutMixConfig)
    candidates: CandidatesConfig = nested(CandidatesConfig)
    filter: FilterConfig = nested(FilterConfig)
    batching: BatchingConfig = nested(BatchingConfig)
    compute: ComputeConfig = nested(ComputeConfig)
    shards: ShardConfig = nested(ShardConfig)

    @property
    def takes_student(self) -> bool:
        """Whether something here goes by a student, so that one can, and must, be given."""
        return self.guidance.adv_weight > 0 or self.candidates.takes_student

    def validate(self) -> None:
        if self.cutmix.every and self.batching.group == 1:
            raise ValueError("--cutmix-every acts between the images of a group: with --group 1 there is none")
        if self.shards.shard_size % self.batching.group:
            raise ValueError(
                f"--shard-size {self.shards.shard_size} is not a multiple of --group {self.batching.group}"
            )
        if self.compute.quantise != "none" and self.guidance.acts and self.guidance.gradient == "unet":
            raise ValueError(
                f"--quantise {self.compute.quantise} needs --gradient latent: rounding to 8 bits has no gradient"
            )
