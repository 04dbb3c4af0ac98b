"""The parts of a prior in training: made anew, or those of a pipeline that exists."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dfkd.config import PriorTrainConfig
from dfkd.errors import UsageError
from dfkd.synthesis.prompts import words_of
from dfkd.training.conditions import ClassNumbers, Conditions, Words
from dfkd.training.denoising import Denoising
from dfkd.training.prior_networks import (
    check_sizes,
    make_denoiser,
    make_scheduler,
    make_text_encoder,
)
from dfkd.training.prompt_tokens import Prompts, make_tokenizer

KINDS = "StableDiffusionPipeline (UNet2DConditionModel with one CLIP text encoder), or a UNet2DModel"


@dataclass
class Parts:
    """denoising: what learns, on the device. scheduler: of diffusers. vae: frozen, None for pixels.

    text_encoder: also where it learns within `denoising`. channels, side: of what is denoised. size: of the images.
    """

    denoising: Denoising
    scheduler: Any
    conditions: Conditions
    vae: Any
    text_encoder: Any
    tokenizer: Any
    channels: int
    side: int
    size: int

    @property
    def denoiser(self) -> Any:
        return self.denoising.denoiser


def labels_of(class_names: Sequence[str]) -> tuple[str, ...]:
    """The classes as a prompt names them. Raises UsageError where two become one."""
    found = tuple(words_of(name) for name in class_names)
    if twice := [name for name in found if found.count(name) > 1]:
        raise UsageError(f"two classes are called {twice[0]!r}", "prompts tell classes apart", "rename one of them")
    return found


def new_parts(
    config: PriorTrainConfig,
    size: int,
    class_names: Sequence[str],
    vae: Any,
    device: torch.device,
) -> Parts:
    """Networks whose weights follow from the seed. vae: of a latent prior.

    Raises UsageError for sizes that do not fit.
    """
    own, names = config.denoiser, labels_of(class_names)
    factor = 1 if vae is None else side_factor(vae)
    side = check_sizes(own, size, factor)
    channels = 3 if vae is None else int(vae.config.latent_channels)
    scheduler = make_scheduler(own)
    text_encoder = tokenizer = None
    conditions: Conditions = Conditions()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.train.seed)
        denoiser = make_denoiser(own, channels, side, len(names))
        if own.condition == "text":
            prompts = Prompts(config.prompts, config.free_prompts, class_names)
            tokenizer = make_tokenizer(prompts)
            text_encoder = make_text_encoder(own, tokenizer)
            length = int(tokenizer.model_max_length)
            conditions = Words(prompts, config.prompts[0], names, tokenizer, length, device)
    if own.condition == "class":
        conditions = ClassNumbers(names, device)
    denoising = placed(Denoising(denoiser, scheduler, text_encoder), device)
    return Parts(denoising, scheduler, conditions, vae, text_encoder, tokenizer, channels, side, size)


def side_factor(vae: Any) -> int:
    """Image side over latent side of a VAE of diffusers."""
    widths = vae.config.get("block_out_channels") or vae.config["decoder_block_out_channels"]
    return int(2 ** (len(widths) - 1))


def placed(network: Any, device: torch.device) -> Any:
    """The network on the device, channels last."""
    return network.to(device).to(memory_format=torch.channels_last)
