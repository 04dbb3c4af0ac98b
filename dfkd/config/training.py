"""Settings of training: what teacher and student have in common, and what each adds."""

from dataclasses import MISSING, dataclass

from dfkd.config.fields import Config, nested, option

VIEWS = ("none", "flip", "crop-flip", "crop-altflip", "shift", "affine", "affine-colour", "rrc-flip")
MIXES = ("none", "mixup", "cutmix", "both")
LOADERS = ("auto", "dali", "resident", "torch")


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig(Config):
    """Optimiser: its rate over the run, and an average of the weights"""

    EXAMPLE = "--lr 0.1 --schedule cosine --warmup 100"

    optimiser: str = option(
        "sgd",
        "sgd, adamw, or muon: SGD whose updates of the convolutions' filters are made orthogonal",
        choices=("sgd", "adamw", "muon"),
    )
    lr: float = option(0.1, "highest learning rate", low=0)
    muon_lr: float = option(0.05, "muon: highest learning rate of the filters", low=0)
    momentum: float = option(0.9, "momentum; of adamw its first beta", low=0, high=1)
    beta2: float = option(0.999, "adamw: its second beta, of the squared gradients", low=0, high=1)
    nesterov: bool = option(False, "Nesterov's momentum")
    weight_decay: float = option(5e-4, "weight decay", low=0)
    decay: str = option(
        "all", "what decays: all parameters, or weights alone, without biases and norms", choices=("all", "weights")
    )
    schedule: str = option(
        "cosine",
        "learning rate over the run; onecycle: a rise from 1/25 over the first 30 %, then a cosine to 0; trapezoid:"
        " constant, and over the last 40 % straight down to 0",
        choices=("multistep", "cosine", "onecycle", "trapezoid", "constant"),
    )
    milestones: tuple[str, ...] = option(
        ("150/240", "180/240", "210/240"),
        "multistep: it falls at these parts of the run (a fraction or a decimal below 1)",
    )
    gamma: float = option(0.1, "multistep: by this factor", low=0, high=1)
    warmup: int = option(0, "linear rise of the learning rate at the start", low=0, unit="steps")
    clip_norm: float = option(0.0, "largest 2-norm of the gradient, which is scaled down to it; 0: off", low=0)
    ema: float = option(
        0.0, "decay of an average of the weights that replaces them in the results; 0: off", low=0, high=0.99999
    )

    def validate(self) -> None:
        self.milestone_parts()
        if self.optimiser == "muon" and not self.lr:
            raise ValueError("--optimiser muon with --lr 0: both rates follow one schedule; give --lr above 0")

    def milestone_parts(self) -> tuple[float, ...]:
        """The milestones as parts of the run, ascending."""
        return tuple(sorted(_part(text) for text in self.milestones))


@dataclass(frozen=True, kw_only=True)
class LoaderConfig(Config):
    """Loader: how batches come, not what is in them"""

    EXAMPLE = "--loader dali --workers 4"

    loader: str = option(
        "auto",
        "dali: images decoded and viewed ahead of the steps by NVIDIA DALI; resident: every image on the device; torch:"
        " decoded by worker processes; auto: by what fits into memory and is installed, and it says why",
        choices=LOADERS,
        identity=False,
    )
    workers: int = option(2, "threads (dali) or processes (torch) that decode images", low=0, identity=False)


@dataclass(frozen=True, kw_only=True)
class TrainComputeConfig(Config):
    """Compute: where and how"""

    EXAMPLE = "--device cuda --amp bf16 --compile default"

    device: str = option("auto", "auto (the GPU where there is one), cpu, cuda or cuda:N", identity=False)
    amp: str = option("off", "automatic mixed precision", choices=("bf16", "fp16", "off"))
    compile: str = option(
        "off",
        "the networks by torch.compile, in this mode; results differ by rounding",
        choices=("off", "default", "reduce-overhead", "max-autotune"),
        identity=False,
    )
    cuda_graph: bool = option(False, "launch a whole step as one CUDA graph", identity=False)
    sync_bn: str = option(
        "auto",
        "under torchrun BatchNorm takes statistics over all processes, as one would over the whole batch; GPUs only;"
        " auto: there",
        choices=("auto", "on", "off"),
    )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Config):
    """Logging, beside OUT/log.jsonl"""

    EXAMPLE = "--tensorboard"

    tensorboard: bool = option(False, "also to OUT/tensorboard; needs the package tensorboard", identity=False)
    wandb: str | None = option(
        None, "also to this project of Weights & Biases; needs the package wandb", identity=False
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Training: how long, on which views"""

    EXAMPLE = "--epochs 100 --batch-size 128 --augment crop-flip --seed 1"
    EXCLUSIVE = (("steps", "epochs"),)

    epochs: int | None = option(None, "length of the run, in passes over the images", low=1, unit="epochs")
    steps: int | None = option(None, "length of the run in batches; instead of --epochs", low=1, unit="steps")
    batch_size: int = option(256, "images per step, of all processes together", low=2, unit="images")
    augment: str = option(
        "crop-flip",
        "random views of the images; crop-altflip: an image is mirrored in every other epoch",
        choices=VIEWS,
    )
    checkpoint_every: int | None = option(
        None, "between checks, each with a checkpoint; a twentieth of the run", low=1, unit="steps"
    )
    seed: int = option(0, "of initial weights, order and views", low=0)
    resume: bool = option(
        True, "take up an unfinished run of the same settings; --no-resume starts over", identity=False
    )
    optimiser: OptimiserConfig = nested(OptimiserConfig)
    loader: LoaderConfig = nested(LoaderConfig)
    compute: TrainComputeConfig = nested(TrainComputeConfig)
    logging: LoggingConfig = nested(LoggingConfig)

    def validate(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("either --steps or --epochs is the length of the run: give one of the two")
        if self.optimiser.optimiser == "muon":
            for flag, given in (("--cuda-graph", self.compute.cuda_graph), ("--amp fp16", self.compute.amp == "fp16")):
                if given:
                    why = "torch's capture and its scale of gradients know SGD alone"
                    raise ValueError(f"--optimiser muon with {flag}: {why}; leave one out")


@dataclass(frozen=True, kw_only=True)
class TeacherTrainConfig(Config):
    """Supervised training of a classifier on real images."""

    SECTION = "teacher"

    train: TrainConfig = nested(TrainConfig, epochs=200, lr=0.1, nesterov=True, decay="weights", schedule="cosine")
    label_smoothing: float = option(0.0, "share of the target spread over all classes", low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig(Config):
    """Denoiser: a UNet that is trained from nothing"""

    EXAMPLE = "--space pixel --condition class --widths 32,64,128 --attention-at 8"

    space: str = option(
        "pixel",
        "what it denoises: pixels, or the latents of an autoencoder that is trained before it",
        choices=("pixel", "latent"),
    )
    condition: str = option(
        "class",
        "what it is told: the class's number, the words of a prompt through a CLIP text encoder, or nothing",
        choices=("class", "text", "none"),
    )
    predict: str = option(
        "flow",
        "what it answers with: the noise, v of a discrete schedule, or flow matching's noise minus image",
        choices=("flow", "v", "epsilon"),
    )
    widths: tuple[int, ...] = option((32, 64, 128, 128), "channels of each level, at half the side each", low=1)
    blocks: int = option(1, "residual blocks of a level on the way down; one more on the way up", low=1)
    attention_at: int = option(8, "largest side, in what is denoised, at which there is attention; 0: nowhere", low=0)
    head_width: int = option(16, "channels of an attention head", low=1)
    norm_groups: int = option(8, "groups of channels in every norm, of the autoencoder's too", low=1)
    text_width: int = option(64, "condition text: width of the text encoder", low=8)
    text_layers: int = option(1, "condition text: its layers", low=1)

    def validate(self) -> None:
        if not self.widths:
            raise ValueError("--widths names no level")
        if self.condition != "text" and (self.text_width, self.text_layers) != (64, 1):
            raise ValueError("--text-width and --text-layers are of --condition text")
        if self.condition == "text" and (self.space, self.predict == "flow") != ("latent", False):
            raise ValueError(
                "--condition text makes a pipeline of the Stable Diffusion kind: it needs --space latent and --predict"
                " v or epsilon"
            )
        for name, values in (("widths", self.widths), ("text-width", (self.text_width,))):
            if odd := [value for value in values if value % self.head_width]:
                raise ValueError(f"--{name} has {odd[0]}, which --head-width {self.head_width} does not divide")
        if odd := [value for value in self.widths if value % self.norm_groups]:
            raise ValueError(f"--widths has {odd[0]}, which --norm-groups {self.norm_groups} does not divide")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(Config):
    """Autoencoder of --space latent: which, or how it is trained"""

    EXAMPLE = "--space latent --autoencoder-steps 2400"

    source: str | None = option(
        None, "a pipeline whose VAE is taken as it is, instead of training one: a folder or a hub id", flag="vae"
    )
    data: str | None = option(
        None, "images that it learns from instead of --data; their classes do not count", flag="autoencoder_data"
    )
    widths: tuple[int, ...] = option(
        (16, 32, 48),
        "its channels at each level; every level but the first halves the side",
        low=1,
        flag="autoencoder_widths",
    )
    channels: int = option(8, "channels of the latents", low=1, flag="latent_channels")
    steps: int = option(2400, "length of its training", unit="steps", low=1, flag="autoencoder_steps")
    batch_size: int = option(32, "images per step", unit="images", low=2, flag="autoencoder_batch_size")
    lr: float = option(2e-3, "its highest learning rate", low=0, flag="autoencoder_lr")
    edge_weight: float = option(0.5, "weight of the L1 of neighbouring pixels' differences", low=0)
    kl_weight: float = option(1e-3, "weight of the KL divergence that keeps the latents one cloud", low=0)

    def validate(self) -> None:
        if self.source is not None and (own := [name for name in self.changed() if name != "vae"]):
            raise ValueError(f"--{own[0].replace('_', '-')} with --vae: that one is taken as it is; leave one out")


@dataclass(frozen=True, kw_only=True)
class PriorTrainConfig(Config):
    """Training of a diffusion prior on images: from nothing, or of a pipeline that exists."""

    SECTION = "prior"

    train: TrainConfig = nested(
        TrainConfig,
        steps=10_000,
        batch_size=64,
        augment="flip",
        optimiser="adamw",
        lr=1e-3,
        beta2=0.99,
        weight_decay=0.01,
        decay="weights",
        schedule="trapezoid",
        warmup=200,
        clip_norm=1.0,
        ema=0.999,
    )
    denoiser: DenoiserConfig = nested(DenoiserConfig)
    autoencoder: AutoencoderConfig = nested(AutoencoderConfig)
    prompts: tuple[str, ...] = option(
        ("a photo of a {label}",), "condition text: templates, drawn evenly; the first becomes the prior's own"
    )
    free_prompts: tuple[str, ...] = option(
        (), "condition text: prompts, beside the empty one, of images whose class is left out"
    )
    drop: float = option(
        0.1, "share of images whose class is left out, which classifier-free guidance needs", low=0, high=1
    )
    lora_rank: int = option(0, "with --prior: train low-rank changes of its attention alone; 0: all weights", low=0)
    train_text_encoder: bool = option(False, "with --prior: train its text encoder too")
    weights: str = option("fp16", "precision of the files", choices=("fp16", "fp32"))

    def validate(self) -> None:
        if not self.prompts:
            raise ValueError("--prompts names none: the first is the prior's own")
        if self.lora_rank and self.train_text_encoder:
            raise ValueError("--lora-rank changes the denoiser alone: leave --train-text-encoder out")


@dataclass(frozen=True, kw_only=True)
class DecoderTrainConfig(Config):
    """Training of a tiny decoder of a prior's latents, on what the prior itself draws."""

    SECTION = "decoder"

    train: TrainConfig = nested(
        TrainConfig,
        steps=2000,
        batch_size=16,
        augment="none",
        optimiser="adamw",
        lr=1e-3,
        beta2=0.99,
        weight_decay=0.0,
        schedule="cosine",
        warmup=100,
        clip_norm=1.0,
        ema=0.99,
    )
    images: int = option(512, "trajectories of the prior to learn from; a sixteenth is held out", unit="images", low=16)
    classes: tuple[str, ...] = option((), "words for {label} in the prompt; none: those that the prior states")
    prompt: str | None = option(None, "template; none: the prior's own")
    size: int = option(0, "height and width of the images; 0: the prior's own", unit="pixels", low=0)
    cfg: float | None = option(None, "classifier-free guidance scale, as of dfkd-generate", low=0)
    sample_steps: int = option(20, "denoising steps of a trajectory, by ddim", low=1, high=1000)
    estimates: int = option(4, "of the steps of a trajectory, whose clean estimates are decoded", low=1)
    width: int = option(64, "channels of every layer", low=1)
    blocks: int = option(3, "residual blocks of a level; the finest has one", low=1)
    edge_weight: float = option(0.5, "weight of the L1 of neighbouring pixels' differences", low=0)
    weights: str = option("fp16", "precision of the file", choices=("fp16", "fp32"))

    def validate(self) -> None:
        if self.train.augment != "none":
            why = "a view of an image is no answer to its latents"
            raise ValueError(f"--augment {self.train.augment}: {why}; leave it out")


@dataclass(frozen=True, kw_only=True)
class MsarcConfig(Config):
    """mSARC: the student's activation maps shall be the teacher's (SpaceshipNet)"""

    EXAMPLE = "--msarc-weight 0.3"

    weight: float = option(0.0, "its weight; theirs is the number of classes; 0: off", low=0, flag="msarc_weight")
    maps: str = option(
        "both",
        "which maps it compares: class activation maps of the last features, Grad-CAMs of three stages, or both",
        choices=("both", "cam", "gradcam"),
        flag="msarc_maps",
    )
    teacher_stages: tuple[str, ...] = option(
        (),
        "modules of the teacher whose outputs the Grad-CAMs are of, instead of the three found by resolution",
        flag="msarc_teacher_stages",
    )
    student_stages: tuple[str, ...] = option(
        (), "the student's, as many and in the same order", flag="msarc_student_stages"
    )

    def validate(self) -> None:
        stages = self.teacher_stages or self.student_stages
        if (self.maps != "both" or stages) and not self.weight:
            raise ValueError(
                "--msarc-maps, --msarc-teacher-stages and --msarc-student-stages act with --msarc-weight above 0"
            )
        if self.maps == "cam" and stages:
            raise ValueError("--msarc-maps cam takes no stages: class activation maps are of the last features")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Config):
    """Distillation; the defaults are DiffDFKD's of CIFAR-10 (arXiv:2504.00870)."""

    SECTION = "distill"

    student: str = option(
        MISSING, "architecture of the student: a name of the zoo (resnet18, wrn16_2, ...), or timm:NAME and the like"
    )
    train: TrainConfig = nested(TrainConfig, epochs=240, lr=0.2, schedule="multistep")
    temperature: float = option(30.0, "of the softened distributions", low=1e-3)
    ce_weight: float = option(0.0, "weight of the cross-entropy with the labels beside the KL divergence", low=0)
    losses: tuple[str, ...] = option(
        (), "losses of your own beside these, each FILE.py:CLASS(weight=0.1, ...)", flag="loss"
    )
    mix: str = option("none", "mixtures of two images, labelled by the teacher", choices=MIXES)
    mix_alpha: float = option(1.0, "lam ~ Beta(alpha, alpha) of the mixtures", low=1e-3)
    held_out: float = option(0.05, "part of the images kept for choosing the best checkpoint", low=0, high=0.5)
    on_bad_sample: str = option(
        "fail",
        "an image that is damaged: fail ends the run before it begins; skip leaves such images out",
        choices=("fail", "skip"),
        identity=False,
    )
    kernels: str = option(
        "auto",
        "what computes the loss and its gradient: one launch in Triton, or PyTorch; auto: triton on a GPU",
        choices=("auto", "triton", "torch"),
        identity=False,
    )
    msarc: MsarcConfig = nested(MsarcConfig)

    def validate(self) -> None:
        if self.ce_weight and self.mix != "none":
            raise ValueError(
                f"--ce-weight {self.ce_weight} with --mix {self.mix}: a mixture of two images has no single label"
            )
        if not self.msarc.weight:
            return
        for flag, given in (
            ("--compile", self.train.compute.compile != "off"),
            ("--cuda-graph", self.train.compute.cuda_graph),
        ):
            if given:
                raise ValueError(
                    f"--msarc-weight with {flag}: maps are taken inside of the networks, and Grad-CAMs are"
                    " differentiated twice; leave one of the two out"
                )
        if self.train.compute.sync_bn == "on" and self.msarc.maps != "cam":
            raise ValueError(
                "--msarc-weight with --sync-bn on: torch's SyncBatchNorm has no second derivative, which Grad-CAMs"
                " need; use --sync-bn off, or --msarc-maps cam"
            )


def _part(text: str) -> float:
    over, _, under = text.partition("/")
    try:
        part = float(over) / float(under or 1)
    except (ValueError, ZeroDivisionError):
        part = -1.0
    if not 0 < part < 1:
        raise ValueError(f"--milestones has {text!r}: it must be between 0 and 1, as in 0.75 or 180/240")
    return part
