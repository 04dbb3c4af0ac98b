"""Settings of the networks that a run is given: the prior's files, and the teacher, or several, with what it is fed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfkd.config.fields import Config, option

RESIZES = ("antialias", "published")  # how a network is shown images that are larger than its own

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
