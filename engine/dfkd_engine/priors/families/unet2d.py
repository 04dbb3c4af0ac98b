"""UNets without text, of pixels (DDPM, arXiv 2006.11239), in patches or not, or of latents; with a class id or not."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from dfkd_engine.errors import EngineError
from dfkd_engine.priors.families.class_names import ClassNames
from dfkd_engine.priors.families.family import Family, prediction
from dfkd_engine.priors.folder import FACTS, PriorFolder
from dfkd_engine.priors.patches import Patches


class PixelUNet(Family):
    """class_id int64 [B], where the UNet has class embeddings; the unconditional row has `null_class` of dfkd.json.

    Without such an entry all embeddings are classes, and classifier-free guidance has no row to move away from.
    `patch_size` p of dfkd.json: what it takes are patches of p x p pixels as 3 p p channels (patches.py).
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
        patches: Patches | None = None,
    ) -> None:
        super().__init__(config)
        self.patches = patches
        self.classes, self.null_class, self.device = classes, null_class, torch.device(device)
        if classes is not None:
            self.inputs, self.facts = ("class_id",), classes.facts()
        if patches is not None:
            self.facts = {**self.facts, "patch_size": patches.patch_size}
        self.multiple = 2 ** (len(config.get("block_out_channels", (224, 448, 672, 896))) - 1)
        self.cfg = "none" if null_class is None else "rows"

    @classmethod
    def load(cls, folder: PriorFolder, dtype: torch.dtype, device: torch.device | str) -> Self:
        config = folder.configs[cls.part]
        channels, patches = (config.get("in_channels", 3), config.get("out_channels", 3)), patches_of(folder, cls.vaes)
        own = 3 if patches is None else 3 * patches.patch_size**2
        if not cls.vaes and channels not in ((own, own), (own, 2 * own)):
            why = f"without a VAE they are those of an image, {own}, and of its variance where that was learned"
            why += "" if patches is None else f", in patches of {patches.patch_size} x {patches.patch_size} pixels"
            raise cls.refuse(folder, f"unet takes {channels[0]} and gives {channels[1]} channels", why)
        if (kind := config.get("class_embed_type")) is not None:
            raise cls.refuse(folder, f"unet has class_embed_type = {kind}", "want class ids, or none")
        if (embeddings := config.get("num_class_embeds")) is None:
            return cls(config, None, None, device, patches)
        null_class = folder.configs["dfkd"].get("null_class")
        classes = embeddings - (null_class is not None)
        if null_class is not None and (type(null_class) is not int or null_class != classes):
            why = f"null_class is {null_class!r}; of {embeddings} embeddings it is the last one, {classes}"
            raise EngineError(str(folder.path / FACTS), why, "correct it, or leave it out where there is none")
        return cls(config, ClassNames.of(folder, classes), null_class, device, patches)

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


def patches_of(folder: PriorFolder, vaes: Sequence[str] = ()) -> Patches | None:
    """The patches that dfkd.json states. Raises EngineError: no size of a patch, or one beside a VAE."""
    if (size := folder.configs["dfkd"].get("patch_size")) is None:
        return None
    where = str(folder.path / FACTS)
    if vaes:
        raise EngineError(where, f"patch_size = {size!r} beside a VAE, which makes the latents", "leave it out")
    try:
        return Patches(size)
    except ValueError as error:
        raise EngineError(where, f"patch_size: {error}", "correct it") from None


class LatentUNet(PixelUNet):
    """A UNet without text on the latents of a VAE: unconditional, or with a class id."""

    name, vaes = "UNet of latents", ("AutoencoderKL", "AutoencoderTiny")
    requires = ("vae",)
