"""Settings of training: what teacher and student have in common, and what each adds."""

from dataclasses import MISSING, dataclass

from dfkd.config.fields import Config, nested, option

VIEWS: tuple[str, ...] = ("none", "flip", "crop-flip", "crop-altflip", "shift", "affine", "affine-colour", "rrc-flip")
VIEWS += ("crop-flip-cutout", "affine-colour-cutout")
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
        "random views of the images; crop-altflip: an image is mirrored in every other epoch; cutout: then a square of"
        " half the side becomes grey",
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
    taught_by: str = option(
        "all",
        "of several --clients, all: the weighted mean of their logits about each class; own: an image is learned from"
        " those alone that know its class",
        choices=("all", "own"),
    )
    losses: tuple[str, ...] = option(
        (), "losses of your own beside these, each FILE.py:CLASS(weight=0.1, ...)", flag="loss"
    )
    mix: str = option("none", "mixtures of two images, labelled by the teacher", choices=MIXES)
    mix_alpha: float = option(1.0, "lam ~ Beta(alpha, alpha) of the mixtures", low=1e-3)
    held_out: float = option(0.05, "part of the images kept for choosing the best checkpoint", low=0, high=0.5)
    plateau: int | None = option(
        None,
        "end before the length of the run, once so many checks in a row found no better agreement with the teacher on"
        " the images held out",
        unit="checks",
        low=1,
    )
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
        if self.plateau is not None and not self.held_out:
            raise ValueError(f"--plateau {self.plateau} with --held-out 0: agreement is measured on images held out")
        if self.taught_by == "own" and self.mix != "none":
            why = "a mixture of two images may have no teacher that knows both classes"
            raise ValueError(f"--taught-by own with --mix {self.mix}: {why}; leave one out")
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
