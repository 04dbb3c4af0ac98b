"""A trained network together with what it takes to feed it and to read it; on disk, model.safetensors and config.json.

config.json: architecture, num_classes, class_names, input_size, mean, std, resize, and whatever the writer adds.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from dfkd.config.fields import convert
from dfkd.config.networks import channel_fault
from dfkd.errors import UsageError
from dfkd.files import replace_file, replace_text
from dfkd.resizing import check_resize, resized
from dfkd.rgb import square
from dfkd.teachers import hub, trial
from dfkd.teachers.adapters import Channels
from dfkd.teachers.sources import CONFIG, WEIGHTS, read_source

_BY_MODE = (_BatchNorm, _DropoutNd)  # layers that answer otherwise in training mode


@dataclass(frozen=True)
class Classifier:
    """A teacher or a student: called with images, it gives logits [B, len(class_names)].

    module        normalised images [B, 3, input_size, input_size] -> logits
    mean, std     per channel, of images in 0..1
    architecture  the name that `build` takes; "" for a module of your own, which can be saved but not built again
    resize        "antialias" or "published": how images that are larger are shown to it (dfkd.resizing)
    source        what it was loaded from, "" for a module of your own
    """

    module: nn.Module
    class_names: tuple[str, ...]
    mean: Channels
    std: Channels
    input_size: int
    architecture: str = ""
    resize: str = "antialias"
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3:
            why = "images have three channels"
            raise UsageError(f"a classifier of mean {self.mean} and std {self.std}", why, "give three numbers each")
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "mean", tuple(map(float, self.mean)))
        object.__setattr__(self, "std", tuple(map(float, self.std)))
        if (fault := channel_fault(self.mean, self.std)) is not None:
            raise UsageError(f"a classifier of {fault}", "both are of images in 0..1", "divide those of 0..255 by 255")
        check_resize(self.resize)
        if twice := [name for name in self.class_names if self.class_names.count(name) > 1]:
            raise UsageError(f"a classifier with two classes named {twice[0]!r}", "classes are matched by name")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        architecture: str | None = None,
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: int | None = None,
        resize: str | None = None,
    ) -> Self:
        """A classifier in evaluation mode, on the CPU, every weight found and used.

        source: a folder of `save_pretrained` (of dfkd-train-teacher, or OUT/last of dfkd-distill), of timm or of
        transformers, or its model.safetensors; a pretrained `timm:NAME`, `torchvision:NAME` or
        `transformers:FOLDER_OR_ID`; or another weight file (dfkd.teachers.weights), which needs architecture,
        class_names, mean, std and, unless the architecture is of the zoo, input_size; a `file:` network may state them.
        The other arguments override what the source says. class_names: also text, as `--classes` takes it.

        Raises UsageError: something is missing, architecture, class count or any weight does not fit, or the network
        answers otherwise than with logits (`tried`).
        """
        names = convert(class_names, tuple[str, ...]) if isinstance(class_names, str) else class_names
        given = {"class_names": names, "mean": mean, "std": std, "input_size": input_size, "resize": resize}
        return cls(**read_source(source, architecture, given), source=str(source)).tried()

    def tried(self, training: bool = False) -> Self:
        """The classifier, once its network was seen to answer a few images with logits [B, len(class_names)].

        Where the logits are part of the answer ({"logits": ...}, or the one part of that shape) the network is wrapped
        so that it answers with them alone. training: the network will be trained, and is tried in that mode too.
        Raises UsageError: another number of logits, probabilities, NaN, an answer that depends on the rest of the batch
        or on chance, or a network that fails on images of input_size.
        """
        noise = torch.rand(trial.ROWS, 3, self.input_size, self.input_size, generator=torch.Generator().manual_seed(0))
        level = torch.linspace(0.1, 0.9, trial.ROWS).view(-1, 1, 1, 1)
        images = self.prepare(torch.lerp(level, noise, 0.5).to(self.device))
        module = trial.tried(self.module, images, len(self.class_names), self._name, training)
        return self if module is self.module else self.replace(module=module)

    def save_pretrained(self, folder: str | Path, **facts: Any) -> None:
        """Write folder/model.safetensors and folder/config.json, which also holds `facts` (in JSON's types).

        Of one that was loaded, or returned by a training, also folder/README.md: its model card, from what is on record
        where it came from. A README.md that is no such card stays. Each file is whole or absent.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # contiguous(): safetensors keeps no strides, and training leaves weights channels-last.
        weights = {key: value.detach().cpu().contiguous() for key, value in self.module.state_dict().items()}
        content = safetensors.torch.save(weights)
        replace_file(folder / WEIGHTS, lambda file: file.write(content))
        replace_text(folder / CONFIG, json.dumps({**facts, **self.config()}, indent=2, sort_keys=True) + "\n")
        if self.source:
            hub.save_card(self, folder)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to the repository "OWNER/NAME" of the Hugging Face hub, made if needed.

        token: that may write; the one of `hf auth login` where not given. Returns the repository's address.
        Raises UsageError: no network, no such right, or no such name.
        """
        return hub.push(self, repo_id, private, token)

    def config(self) -> dict[str, Any]:
        """What config.json says of it."""
        names = [spec.name for spec in dataclasses.fields(self) if spec.name not in ("module", "source")]
        return {**{name: getattr(self, name) for name in names}, "num_classes": len(self.class_names)}

    def __call__(self, images: Tensor | Image.Image | Sequence[Image.Image]) -> Tensor:
        """Logits [B, C] of images [B, 3, H, W] in 0..1 (or uint8), or of PIL images of any size.

        A PIL image's shorter side is resized to input_size and its centre cut out.
        Raises UsageError for a network in training mode, where images would change one another's answers, and it.
        """
        if any(layer.training and isinstance(layer, _BY_MODE) for layer in self.module.modules()):
            raise UsageError(
                f"{self._name} is in training mode", "its answers would depend on the batch", "call .eval()"
            )
        if isinstance(images, Image.Image):
            images = [images]
        if not isinstance(images, Tensor):
            images = torch.stack([_pixels(image, self.input_size) for image in images])
        if not images.is_floating_point():
            images = images.float() / 255
        return self.logits(images.to(self.device))

    def logits(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1, on the network's device -> logits [B, C], differentiable."""
        logits: Tensor = self.module(self.prepare(images))
        return logits

    def prepare(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1, any float dtype -> resized and normalised, differentiable."""
        images = resized(images, self.input_size, self.resize)
        mean = images.new_tensor(self.mean).view(1, 3, 1, 1)
        std = images.new_tensor(self.std).view(1, 3, 1, 1)
        return (images - mean) / std

    def label_probability(self, images: Tensor, labels: Tensor) -> Tensor:
        """The probability [B] of each label, int64 [B], for images [B, 3, H, W] in 0..1; all on its device."""
        return self.logits(images).float().softmax(1).gather(1, labels[:, None])[:, 0]

    def answers(self, images: Tensor, labels: Tensor) -> Tensor:
        """Logits float32 [B, C] of images uint8 [B, 3, H, W] whose labels, int64 [B], are known, on its device: several
        teachers answer by those that know the label."""
        return self(images).float()

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU for a network without any."""
        return next((tensor.device for tensor in self.module.state_dict().values()), torch.device("cpu"))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The module moved in place, with `nn.Module.to`'s arguments; returns self."""
        self.module.to(*args, **kwargs)
        return self

    def eval(self) -> Self:
        """The module in evaluation mode; returns self."""
        self.module.eval()
        return self

    def freeze(self, device: torch.device | str = "cpu") -> Self:
        """For inference on `device`: evaluation mode, no gradients of weights, channels-last; returns self."""
        self.module.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """The module's parameters."""
        return self.module.parameters()

    def state_dict(self) -> dict[str, Any]:
        """The module's weights and buffers by name."""
        return self.module.state_dict()

    def replace(self, **fields: Any) -> Self:
        """A copy with some fields replaced; the module itself is shared."""
        return dataclasses.replace(self, **fields)

    def digest(self) -> str:
        """SHA-256 over architecture, every weight and buffer, and how images are prepared."""
        fed = f"{self.architecture} {self.input_size} {self.mean} {self.std} {self.resize}"
        digest = hashlib.sha256(fed.encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def batch_norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """The layers whose running statistics describe the training data, in definition order; () for e.g. a ViT.

        Synchronised and frozen ones are among them, whose tensors are those of a BatchNorm2d.
        """
        return tuple(
            cast(nn.BatchNorm2d, layer)
            for layer in self.module.modules()
            if (isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm) or is_frozen(layer))
            and layer.running_mean is not None
        )

    def last_linear(self) -> nn.Linear | None:
        """The linear layer that gives the logits, whose input are the network's features; None where there is none."""
        layers = [layer for layer in self.module.modules() if isinstance(layer, nn.Linear)]
        return layers[-1] if layers and layers[-1].out_features == len(self.class_names) else None

    @property
    def sources(self) -> tuple[str, ...]:
        """What it, or each of several, was loaded from."""
        return (self.source,)

    @property
    def _name(self) -> str:
        return self.architecture or type(self.module).__name__

    def described(self) -> str:
        """One line for people: what it is and what it is fed."""
        channels = [", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std)]
        side = self.input_size
        scaled = "in 0..1" if (self.mean, self.std) == ((0,) * 3, (1,) * 3) else "mean {}, std {}".format(*channels)
        return f"{self._name}, {len(self.class_names)} classes, fed {side} x {side} pixels, {scaled}"


def is_frozen(layer: nn.Module) -> bool:
    """Whether it is the layer that torchvision and detectron2 have by this name, whose four tensors are buffers."""
    return type(layer).__name__ == "FrozenBatchNorm2d"


def _pixels(image: Image.Image, side: int) -> Tensor:
    """uint8 [3, side, side]: resized (bicubic, antialiased) so that the shorter side fits, the centre cut out."""
    return torch.from_numpy(np.array(square(image, side))).permute(2, 0, 1)
