"""UNets without text, of pixels (DDPM, arXiv 2006.11239) or of latents: unconditional, or with a class id."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from dfkd_engine.errors import EngineError
from dfkd_engine.priors.families.class_names import ClassNames
from dfkd_engine.priors.families.family import Family, prediction
from dfkd_engine.priors.folder import FACTS, PriorFolder


class PixelUNet(Family):
    """class_id int64 [B], where the UNet has class embeddings; the unconditional row has `null_class` of dfkd.json.

    Without such an entry all embeddings are classes, and classifier-free guidance has no row to move away from.
    """

    name = "UNet of pixels"
    part, denoiser = "unet", "UNet2DModel"
    prompt = "{label}"

    @classmethod
    def takes(cls, folder: PriorFolder) -> bool:
        return ("vae" in folder.configs) == bool(cls.vaes)

    def __init__(
        self,
        config: Mapping[str, Any],
        classes: ClassNames | None,
        null_class: int | None,
        device: torch.device | str,
    ) -> None:
        super().__init__(config)
        self.classes, self.null_class, self.device = classes, null_class, torch.device(device)
        if classes is not None:
            self.inputs, self.facts = ("class_id",), classes.facts()
        self.multiple = 2 ** (len(config.get("block_out_channels", (224, 448, 672, 896))) - 1)
        self.cfg = "none" if null_class is None else "rows"

    @classmethod
    def load(cls, folder: PriorFolder, dtype: torch.dtype, device: torch.device | str) -> Self:
        config = folder.configs[cls.part]
        channels = (config.get("in_channels", 3), config.get("out_channels", 3))
        if not cls.vaes and channels not in ((3, 3), (3, 6)):
            why = "without a VAE they are those of an image, 3, and of its variance where that was learned"
            raise cls.refuse(folder, f"unet takes {channels[0]} and gives {channels[1]} channels", why)
        if (kind := config.get("class_embed_type")) is not None:
            raise cls.refuse(folder, f"unet has class_embed_type = {kind}", "want class ids, or none")
        if (embeddings := config.get("num_class_embeds")) is None:
            return cls(config, None, None, device)
        null_class = folder.configs["dfkd"].get("null_class")
        classes = embeddings - (null_class is not None)
        if null_class is not None and (type(null_class) is not int or null_class != classes):
            why = f"null_class is {null_class!r}; of {embeddings} embeddings it is the last one, {classes}"
            raise EngineError(str(folder.path / FACTS), why, "correct it, or leave it out where there is none")
        return cls(config, ClassNames.of(folder, classes), null_class, device)

    def gives(self, channels: int) -> tuple[int, ...]:
        return channels, 2 * channels

    def check(self, prompts: Sequence[str]) -> None:
        if self.classes is not None:
            self.classes.ids(prompts)

    def conditions(self, prompts: Sequence[str], side: int, cfg: float) -> tuple[Tensor, ...]:
        if self.classes is None:
            return ()
        return (torch.tensor(self.classes.ids(prompts), device=self.device),)

    def unconditional(self, prompt: str, side: int) -> tuple[Tensor, ...]:
        if prompt:
            raise self.refuse_negative(prompt)
        return () if self.null_class is None else (torch.tensor([self.null_class], device=self.device),)

    def predict(self, denoiser: Any, z: Tensor, t: Tensor | float, *conditions: Tensor) -> Tensor:
        output: Tensor = denoiser(z, t, class_labels=conditions[0] if conditions else None).sample
        return prediction(output, z)

    def to(self, device: torch.device | str) -> None:
        self.device = torch.device(device)


class LatentUNet(PixelUNet):
    """A UNet without text on the latents of a VAE: unconditional, or with a class id."""

    name, vaes = "UNet of latents", ("AutoencoderKL", "AutoencoderTiny")
    requires = ("vae",)
