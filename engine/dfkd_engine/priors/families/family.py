"""What a family of diffusion models has to say of itself."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dfkd_engine.errors import EngineError
from dfkd_engine.priors.families.text import TextEncoder
from dfkd_engine.priors.folder import PriorFolder
from dfkd_engine.priors.patches import Patches


class Family:
    """A denoiser's conditions, and how it is called with them. This base is a model without any.

    name: for people. part, denoiser: the denoiser's folder and its class in diffusers. vaes: classes of its VAE, () for
    a model of pixels.
    formerly: names that the denoiser's class had in older versions of diffusers.
    requires: parts that it needs beside denoiser and scheduler.
    texts: whether prompts are any text, rather than names of classes.
    prompt: the template that a prior takes where neither its folder nor the user gives one.
    inputs: names of the condition tensors, in order.
    cfg: how classifier-free guidance enters: "rows", by an unconditional row beside each; "input", as an input of a
    network that was distilled with it; "none", not at all.
    multiple, largest: what the sides of latents are a multiple of, and the most that they may be (None: no bound).
    null_class: the class id that stands for none, where there is one beside the classes.
    patches: what stands in a VAE's place for a denoiser of patches of pixels.
    encoders: networks that make the conditions, by part.
    upcasts: whether the VAE computes in float32 beside a denoiser in float16 where its config says force_upcast. Only
    some pipelines of diffusers go by that, which is AutoencoderKL's default.
    readers: the text encoders with their tokenizers, () where conditions are no text.
    facts: what the conditions follow from beside these networks' and tokenizers' files, in JSON's types.

    config: the denoiser's.
    """

    name: ClassVar[str] = "unconditional"
    part: ClassVar[str] = "unet"
    denoiser: ClassVar[str] = "UNet2DModel"
    vaes: ClassVar[tuple[str, ...]] = ()
    formerly: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ()
    texts: ClassVar[bool] = False
    prompt: ClassVar[str] = ""
    upcasts: ClassVar[bool] = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.inputs: tuple[str, ...] = ()
        self.cfg = "none"
        self.null_class: int | None = None
        self.patches: Patches | None = None
        self.multiple = 1
        self.largest: int | None = None
        self.encoders: Mapping[str, nn.Module] = {}
        self.readers: Sequence[TextEncoder] = ()
        self.facts: Mapping[str, Any] = {}

    @classmethod
    def load(cls, folder: PriorFolder, dtype: torch.dtype, device: torch.device | str) -> Self:
        """The family of a folder, its encoders loaded in `dtype`. Raises EngineError for configs that do not fit."""
        return cls(folder.configs[cls.part])

    @classmethod
    def takes(cls, folder: PriorFolder) -> bool:
        """Whether the folder is of this family, where several have the denoiser's class."""
        return True

    def gives(self, channels: int) -> tuple[int, ...]:
        """Channels that the denoiser may give for latents of so many: twice as many where it learned its variance."""
        return (channels,)

    def check(self, prompts: Sequence[str]) -> None:
        """Raise EngineError for a prompt that the prior cannot take, before any is encoded."""

    def conditions(self, prompts: Sequence[str], side: int, cfg: float) -> tuple[Tensor, ...]:
        """The condition tensors [B, ...] of B prompts, in the order of `inputs`, on the networks' device.

        side: of the image, in pixels. cfg: the scale, which enters where it is an input.
        Each prompt is encoded by itself, so that its tensors do not depend on what it came with. Raises EngineError for
        a prompt that the prior cannot take.
        """
        return ()

    def unconditional(self, prompt: str, side: int) -> tuple[Tensor, ...]:
        """`conditions` [1, ...] of the row that classifier-free guidance moves away from. prompt: the negative one."""
        return self.conditions([prompt], side, 1.0)

    def predict(self, denoiser: Any, z: Tensor, t: Tensor | float, *conditions: Tensor) -> Tensor:
        """The denoiser's output for z [B, C, h, w], like it. Only tensor arithmetic: engines are traced from it."""
        output: Tensor = denoiser(z, t).sample
        return output

    def pipeline(self, denoiser: Any) -> Any:
        """diffusers' pipeline of these networks, whose loaders put LoRA weights and tokens in. Raises EngineError."""
        why = "diffusers has no loader for it"
        raise EngineError(f"LoRA weights and tokens cannot be added to {self.name}", why, "leave them out")

    def to(self, device: torch.device | str) -> None:
        """Move the encoders."""
        for network in self.encoders.values():
            network.to(device)

    @classmethod
    def refuse(cls, folder: PriorFolder, fact: str, why: str, todo: str = "") -> EngineError:
        """The error for a config that does not fit."""
        return EngineError(f"prior {folder.path}: {fact}", why, todo or f"use a prior of the kind {cls.name}")

    def refuse_negative(self, prompt: str) -> EngineError:
        """The error for a negative prompt where conditions are no text."""
        return EngineError(f"the negative prompt {prompt!r}", f"the prior, {self.name}, takes no text", "leave it out")


def times(t: Tensor | float, z: Tensor) -> Tensor:
    """The timestep [B] of the rows of z [B, ...], from one number or [B]."""
    return torch.as_tensor(t, device=z.device).expand(z.shape[0])  # len() would fix the batch of a traced graph


def prediction(output: Tensor, z: Tensor) -> Tensor:
    """The part of a denoiser's output that is like z; a learned variance (arXiv 2102.09672) comes behind it."""
    return output[:, : z.shape[1]]
