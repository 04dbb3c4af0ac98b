"""The options of dfkd-generate, without what carries them out: reading them loads no torch."""

import math
from dataclasses import MISSING, dataclass
from pathlib import Path

from dfkd.config import (
    ATTENTION_NAMES,
    BACKEND_NAMES,
    BN_LOSSES,
    DTYPES,
    IMAGE_FORMATS,
    KERNEL_NAMES,
    NORMALISATIONS,
    QUANTISE_NAMES,
    QUANTISING_BACKENDS,
    SAMPLERS,
    STORED_BACKENDS,
)
from dfkd.cli.options import option
from dfkd.synthesis.planning.data_sheets import devices_of

EMBEDDED_PRIOR = Path(__file__).parents[1] / "priors" / "demo"
SHARD_IMAGES = 256  # about as many images as a shard holds unless --shard-size says otherwise


@dataclass(frozen=True)
class GenerateOptions:
    """Synthesise labelled images: a diffusion prior, steered at every step by the gradient of the teacher's loss.

    Writes OUT/shard-*.tar (WebDataset), OUT/manifest.json, OUT/settings.json and OUT/result.json. Started again on the
    same folder it computes what is missing or damaged and nothing else. The same --seed and image id give the same
    image for any --batch, in any order. Several processes share the shards out, and end with the same bytes:
    torchrun --nproc-per-node N --no-python dfkd-generate ...
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
    batch: int = option(
        64, "images in flight: a multiple of 16, or a group; no result depends on it", unit="images", low=1
    )
    micro_batch: int = option(
        0,
        "most images per network call; fewer where memory is short; 0: as memory allows, and a group's gradient in one"
        " call",
        low=0,
    )
    group: int = option(64, "images that share BN statistics and CutMix partners", unit="images", low=1)
    seed: int = option(0, "run seed; with the image id it fixes an image", low=0, high=2**64 - 1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto takes a GPU where there is one")
    dtype: str = option("fp32", "precision of the networks; latents and losses stay fp32", choices=DTYPES)
    backend: str = option(
        "auto",
        "what runs the networks: eager; an engine built by dfkd-engines; auto: of these the one measured quickest",
        choices=BACKEND_NAMES,
    )
    engines: Path = option(Path("build/engines"), "folder of the engines")
    quantise: str = option(
        "none",
        "8-bit UNet, an engine that dfkd-engines built with the same option; decoder, teacher and gradient stay in"
        " --dtype",
        choices=QUANTISE_NAMES,
    )
    attention: str = option(
        "auto", "attention of networks that run eagerly; auto: xformers where it can run", choices=ATTENTION_NAMES
    )
    kernels: str = option(
        "auto",
        "what runs a step beside the networks, two launches, the adversarial loss, and where networks run eagerly their"
        " group norms and the teacher's BatchNorm layers with their statistics: Triton, or PyTorch; auto: triton on a"
        " GPU; results differ by rounding",
        choices=KERNEL_NAMES,
    )
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
    image_format: str = option("png", "file format of the images", choices=IMAGE_FORMATS)
    plan_only: bool = option(False, "print rows per call, memory and predicted seconds, write nothing and stop")
    plan_for: str = option("", "with --plan-only: GPUs to plan for instead, by their data sheet: H100, 8xH100, ...")

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
        if self.quantise != "none":
            able = [name for name in STORED_BACKENDS if name in QUANTISING_BACKENDS]
            if self.backend not in ("auto", *able):
                raise ValueError(
                    f"--quantise {self.quantise} cannot run on --backend {self.backend}: 8-bit networks run as engines"
                    f" of {', '.join(able)}; name one of them, or auto"
                )
            if self.guides and self.gradient == "unet":
                raise ValueError(
                    f"--quantise {self.quantise} needs --gradient latent: rounding to 8 bits has no gradient"
                )
        if self.plan_for:
            devices_of(self.plan_for)
            if not self.plan_only:
                raise ValueError("--plan-for acts only with --plan-only: nothing is run on a GPU that is not here")
            if self.quantise != "none":
                raise ValueError("--plan-for counts the networks in --dtype: leave --quantise out")
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
