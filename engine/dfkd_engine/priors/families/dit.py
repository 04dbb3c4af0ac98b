"""DiT: a transformer on latents that takes a class id (arXiv 2212.09748)."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from dfkd_engine.priors.families.class_names import ClassNames
from dfkd_engine.priors.families.family import Family, prediction, times
from dfkd_engine.priors.folder import PriorFolder


class DiT(Family):
    """class_id int64 [B]. The id behind the last class is "no class", which the unconditional row has."""

    name = "DiT"
    part, denoiser, vaes = "transformer", "DiTTransformer2DModel", ("AutoencoderKL", "AutoencoderTiny")
    formerly = ("Transformer2DModel",)  # as facebook/DiT-XL-2-256 still says; other kinds of models had it too
    requires = ("vae",)
    prompt = "{label}"

    def __init__(self, config: Mapping[str, Any], classes: ClassNames, device: torch.device | str) -> None:
        super().__init__(config)
        self.classes, self.device = classes, torch.device(device)
        self.inputs, self.cfg, self.facts = ("class_id",), "rows", classes.facts()
        self.multiple = config.get("patch_size", 2)

    @classmethod
    def takes(cls, folder: PriorFolder) -> bool:
        return bool(folder.configs[cls.part].get("norm_type", "ada_norm_zero") == "ada_norm_zero")

    @classmethod
    def load(cls, folder: PriorFolder, dtype: torch.dtype, device: torch.device | str) -> Self:
        config = folder.configs[cls.part]
        return cls(config, ClassNames.of(folder, config.get("num_embeds_ada_norm", 1000)), device)

    def gives(self, channels: int) -> tuple[int, ...]:
        return channels, 2 * channels

    def check(self, prompts: Sequence[str]) -> None:
        self.classes.ids(prompts)

    def conditions(self, prompts: Sequence[str], side: int, cfg: float) -> tuple[Tensor, ...]:
        return (torch.tensor(self.classes.ids(prompts), device=self.device),)

    def unconditional(self, prompt: str, side: int) -> tuple[Tensor, ...]:
        if prompt:
            raise self.refuse_negative(prompt)
        return (torch.tensor([len(self.classes.names)], device=self.device),)

    def predict(self, denoiser: Any, z: Tensor, t: Tensor | float, *conditions: Tensor) -> Tensor:
        output: Tensor = denoiser(z, timestep=times(t, z), class_labels=conditions[0]).sample
        return prediction(output, z)

    def to(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
