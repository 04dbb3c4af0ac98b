"""What a distillation run does; the published defaults (DiffDFKD, arXiv:2504.00870, CIFAR-10)."""

from dataclasses import dataclass

from dfkd.config import KERNEL_NAMES
from dfkd.cli.options import option
from dfkd.training.mixing import MIXES
from dfkd.errors import UsageError
from dfkd.data.loader import KINDS
from dfkd.data.loader.settings import LoaderOptions

EPOCHS = 240


@dataclass(frozen=True)
class DistillSettings(LoaderOptions):
    """Options of a run that its student depends on, and those on how it is computed (device to resume)."""

    steps: int | None = option(None, "length of the run in batches; instead of --epochs", low=1, unit="steps")
    epochs: int | None = option(None, f"length of the run; {EPOCHS} where --steps is not given", low=1, unit="epochs")
    batch_size: int = option(256, "images per step", low=1, unit="images")
    lr: float = option(0.2, "peak learning rate of SGD", low=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = option(5e-4, "weight decay of SGD, on all parameters", low=0)
    schedule: str = option("multistep", "learning rate over the run", choices=("multistep", "cosine"))
    milestones: tuple[str, ...] = option(
        ("150/240", "180/240", "210/240"), "multistep: x0.1 at these parts of the run (a fraction or a decimal below 1)"
    )
    warmup: int = option(0, "linear rise of the learning rate at the start", low=0, unit="steps")
    temperature: float = option(30.0, "of the softened distributions", low=1e-3)
    ce_weight: float = option(0.0, "weight of the cross-entropy with the labels beside the KL divergence", low=0)
    msarc_weight: float = option(
        0.0,
        "weight of mSARC: the student's activation maps shall be the teacher's (SpaceshipNet); theirs is the number of"
        " classes; 0: off",
        low=0,
    )
    msarc_maps: str = option(
        "both",
        "which maps it compares: class activation maps of the last features, Grad-CAMs of three stages, or both",
        choices=("both", "cam", "gradcam"),
    )
    msarc_teacher_stages: tuple[str, ...] = option(
        (), "modules of the teacher whose outputs the Grad-CAMs are of, instead of the three found by resolution"
    )
    msarc_student_stages: tuple[str, ...] = option((), "the student's, as many and in the same order")
    augment: str = option("crop-flip", "random views; both networks see the same one", choices=KINDS)
    mix: str = option("none", "mixtures of two images, labelled by the teacher", choices=MIXES)
    mix_alpha: float = option(1.0, "lam ~ Beta(alpha, alpha) of the mixtures", low=1e-3)
    clip_norm: float = option(0.0, "largest 2-norm of the gradient, which is scaled down to it; 0: off", low=0)
    ema: float = option(
        0.0, "decay of an average of the weights that replaces them in the results; 0: off", low=0, high=0.99999
    )
    held_out: float = option(0.05, "part of the images kept for choosing the best checkpoint", low=0, high=0.5)
    checkpoint_every: int | None = option(
        None,
        "between checks on the held-out images, each with a checkpoint; a twentieth of the run",
        low=1,
        unit="steps",
    )
    amp: str = option("off", "automatic mixed precision", choices=("bf16", "fp16", "off"))
    sync_bn: str = option(
        "auto",
        "under torchrun the student's BatchNorm takes statistics over all processes, as one would over the whole batch;"
        " GPUs only; auto: there",
        choices=("auto", "on", "off"),
    )
    seed: int = option(0, "of initial weights, order and augmentation", low=0)

    device: str = option("auto", "auto (the GPU where there is one), cpu, cuda or cuda:N")
    kernels: str = option(
        "auto",
        "what computes the loss and its gradient: one launch in Triton, or PyTorch; auto: triton on a GPU; results"
        " differ by rounding",
        choices=KERNEL_NAMES,
    )
    compile: str = option(
        "off",
        "both networks by torch.compile, in this mode; results differ by rounding",
        choices=("off", "default", "reduce-overhead", "max-autotune"),
    )
    cuda_graph: bool = option(False, "launch a whole step as one CUDA graph")
    cache_logits: str = option(
        "auto",
        "ask the teacher once for every image instead of in every step; auto: where views and mixtures are none;"
        " results differ by rounding at most",
        choices=("auto", "on", "off"),
    )
    tensorboard: bool = option(False, "also log to OUT/tensorboard; needs the package tensorboard")
    wandb: str | None = option(None, "also log to this project of Weights & Biases; needs the package wandb")
    on_bad_sample: str = option(
        "fail",
        "an image that is damaged: fail ends the run before it begins; skip leaves those out that damaged shards hold",
        choices=("fail", "skip"),
    )
    resume: bool = option(True, "take up an unfinished run of the same settings; --no-resume starts over")

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UsageError(
                f"--steps {self.steps} and --epochs {self.epochs} are both given",
                "either one is the length of the run",
                "leave one out, or take back that of a preset with --steps none or --epochs none",
            )
        if self.ce_weight and self.mix != "none":
            raise UsageError(
                f"--ce-weight {self.ce_weight} with --mix {self.mix}",
                "a mixture of two images has no single label",
                "use one of the two",
            )
        self._check_msarc()
        self.milestone_parts()

    def _check_msarc(self) -> None:
        """Raise UsageError for settings of mSARC that would not act."""
        stages = self.msarc_teacher_stages or self.msarc_student_stages
        if (self.msarc_maps != "both" or stages) and not self.msarc_weight:
            raise UsageError(
                "--msarc-maps, --msarc-teacher-stages and --msarc-student-stages act with --msarc-weight above 0",
                todo="give a weight, or leave them out",
            )
        for flag, given in (("--compile", self.compile != "off"), ("--cuda-graph", self.cuda_graph)):
            if given and self.msarc_weight:
                raise UsageError(
                    f"--msarc-weight with {flag}",
                    "maps are taken inside of the networks, and Grad-CAMs are differentiated twice",
                    "leave one of the two out",
                )
        if self.sync_bn == "on" and self.msarc_weight and self.msarc_maps != "cam":
            raise UsageError(
                "--msarc-weight with --sync-bn on",
                "torch's SyncBatchNorm has no second derivative, which Grad-CAMs need",
                "use --sync-bn off, or --msarc-maps cam",
            )
        if self.msarc_maps == "cam" and stages:
            raise UsageError(
                "--msarc-maps cam takes no stages",
                "class activation maps are of the last features",
                "leave --msarc-teacher-stages and --msarc-student-stages out, or compare Grad-CAMs too",
            )

    def milestone_parts(self) -> tuple[float, ...]:
        """The milestones as parts of the run, ascending."""
        return tuple(sorted(_part(text) for text in self.milestones))


# How a run is computed, not what: these may differ between the beginning of a run and its resumption.
# Images that are left out are told by the digest of the data.
COMPUTATION = (
    *("device", "kernels", "compile", "cuda_graph", "cache_logits", "loader", "workers", "on_bad_sample"),
    *("tensorboard", "wandb", "resume"),
)


def _part(text: str) -> float:
    over, _, under = text.partition("/")
    try:
        part = float(over) / float(under or 1)
    except (ValueError, ZeroDivisionError):
        part = -1.0
    if not 0 < part < 1:
        raise UsageError(f"--milestones has {text!r}", "it must be between 0 and 1, as in 0.75 or 180/240")
    return part
