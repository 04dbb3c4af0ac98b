"""Settings of synthesis: how images are sampled, how much a call holds, what runs it, and all of it together."""

from dataclasses import dataclass
from pathlib import Path

from dfkd.config.fields import Config, nested, option
from dfkd.config.guidance import CutMixConfig, GuidanceConfig
from dfkd.config.selection import CandidatesConfig, FilterConfig

DTYPES = ("fp32", "bf16", "fp16")
BACKENDS = ("inductor", "onnxruntime", "tensorrt", "tensorrt-rtx", "torch-tensorrt")  # of engines on disk
QUANTISING_BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")  # those that take 8-bit graphs
SAMPLERS = ("ddpm", "ddim", "euler", "euler-ancestral", "dpmpp2m", "lcm")
ADVERSARIAL_METHODS = ("deepinversion", "fast", "cmi", "generative")  # with an adv_weight among their own settings
METHODS = ("guided", *ADVERSARIAL_METHODS, "folder", "noise")
IMAGE_FORMATS = ("png", "jpg", "npy")
SHARD_IMAGES = 256  # about as many images as a shard holds unless --shard-size says otherwise


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
    teacher_dtype: str = option(
        "fp32",
        "precision of the teacher where it guides; bf16: by autocast, and its gradient runs eagerly",
        choices=("fp32", "bf16"),
    )
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
