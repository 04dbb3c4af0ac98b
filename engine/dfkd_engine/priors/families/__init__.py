"""Families of diffusion models: what a denoiser takes beside latents and time, a file each.

A family of your own is such a file, and its class in FAMILIES.
"""

from dfkd_engine.errors import EngineError
from dfkd_engine.priors.families.dit import DiT
from dfkd_engine.priors.families.family import Family
from dfkd_engine.priors.families.stable_diffusion import StableDiffusion
from dfkd_engine.priors.families.stable_diffusion_3 import StableDiffusion3
from dfkd_engine.priors.families.stable_diffusion_xl import StableDiffusionXL
from dfkd_engine.priors.families.unet2d import LatentUNet, PixelUNet
from dfkd_engine.priors.folder import DENOISERS, PriorFolder

FAMILIES: tuple[type[Family], ...] = (
    StableDiffusionXL,
    StableDiffusion,
    StableDiffusion3,
    DiT,
    PixelUNet,
    LatentUNet,
)


def family_of(folder: PriorFolder) -> type[Family]:
    """The family of a prior's folder, by the class and the config of its denoiser. Raises EngineError."""
    part = next((part for part in DENOISERS if part in folder.configs), None)
    if part is None:
        known = " or ".join(f"{name}/config.json" for name in DENOISERS)
        raise EngineError(f"prior {folder.path}", f"{known} is missing", "point to a diffusers pipeline's folder")
    for family in FAMILIES:
        named = folder.configs[part].get("_class_name")
        if family.part == part and named in (family.denoiser, *family.formerly) and family.takes(folder):
            return family
    kinds = sorted({f"{family.part} {family.denoiser} ({family.name})" for family in FAMILIES})
    named = folder.configs[part].get("_class_name")
    raise EngineError(
        f"prior {folder.path}: {part} is a {named}",
        f"known are {', '.join(kinds)}",
        "use a prior of one of these kinds",
    )
