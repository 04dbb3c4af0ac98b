"""A diffusion model's networks, frozen: from a folder, a hub id or an embedded name to a `Prior`.

What a folder holds is in folder.py, what its family of models takes and does in families/.
"""

import copy
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dfkd_engine import EMBEDDED
from dfkd_engine.attention import set_attention
from dfkd_engine.errors import EngineError
from dfkd_engine.group_norms import set_group_norms
from dfkd_engine.priors.adapters import Added, add_tokens, fuse_loras
from dfkd_engine.priors.families import family_of
from dfkd_engine.priors.families.family import Family
from dfkd_engine.priors.folder import PriorFolder
from dfkd_engine.priors.opening import open_prior
from dfkd_engine.priors.single_file import check_file
from dfkd_engine.priors.source import PriorSource
from dfkd_engine.priors.trial import try_networks

__all__ = ["DTYPES", "EMBEDDED", "Prior", "check_source"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Prior:
    """Frozen networks of a diffusion model, in evaluation mode, without gradients to their weights.

    denoiser: the UNet or transformer. vae: None for a model of pixels, whose latents are the image in -1..1; Patches
        for one of patches of pixels.
    family: what the denoiser takes beside latents and time, with the networks that make it.
    scheduler_config: content of scheduler_config.json; prediction_type is its entry ("epsilon" where it has none).
    latent_channels, latent_size: C and the trained (h, w) of the latents, None where its config does not say.
    vae_scale_factor: image side over latent side.
    scaling_factor, shift_factor: s, m; the denoiser works on s (encoded - m), the decoder on latents / s + m.
    source: as the caller wrote it.
    digests: SHA-256 by component: of each network weights and config, tokenizers, scheduler; "conditions", of what else
        they follow from, such as the names of classes.
    prompt: template of a prompt that suits it. labels: the only words for {label} that it was trained on, () for any.
    tokens: words that textual inversion added.
    files: the keywords of `from_pretrained` that chose the files.
    """

    denoiser: Any  # diffusers gives neither its networks' configs a type nor their calls
    vae: Any  # AutoencoderKL, AutoencoderTiny or Patches
    family: Family
    scheduler_config: dict[str, Any]
    prediction_type: str
    latent_channels: int
    latent_size: tuple[int, int] | None
    vae_scale_factor: int
    scaling_factor: float
    shift_factor: float
    source: str
    digests: Mapping[str, str]
    prompt: str
    labels: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    files: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
        *,
        revision: str | None = None,
        variant: str | None = None,
        offline: bool = False,
        config: str | None = None,
        lora: Sequence[str] = (),
        textual_inversion: Sequence[str] = (),
    ) -> Self:
        """Load a prior.

        source: a folder, a hub id ("owner/name", fetched into the hub's cache on first use), a checkpoint in one file,
        or a name in EMBEDDED.
        revision, variant, offline, config: as of PriorSource.
        lora: FILE_OR_FOLDER[:SCALE] of LoRA weights, fused into the networks. textual_inversion: FILE[:TOKEN] of words
        to be added. Both in safetensors.
        dtype: of the networks; also "fp32", "bf16" or "fp16". A VAE may be wider (`Family.upcasts`).

        Raises EngineError: no such folder or id, a part is missing or damaged, a network of another kind, or parts that
        do not fit.
        """
        import diffusers  # which takes seconds to load

        kind = _dtype(dtype)
        loras, inversions = [Added.lora(text) for text in lora], [Added.inversion(text) for text in textual_inversion]
        folder = open_prior(PriorSource(source, revision, variant, offline, config), check=family_of)
        of = _complete(folder)
        family = of.load(folder, kind, device)
        _check(folder, family)
        denoiser = folder.load(getattr(diffusers, of.denoiser), of.part, torch_dtype=kind)
        vae: Any = family.patches
        if of.vaes:
            vae_class = getattr(diffusers, _vae_class(folder))
            vae = folder.load(vae_class, "vae", torch_dtype=_vae_dtype(folder, of, vae_class, kind))
        digests = _digests(folder, family)
        tokens: tuple[str, ...] = ()
        if loras or inversions:
            pipeline = family.pipeline(denoiser)
            tokens = add_tokens(pipeline, inversions, digests)
            fuse_loras(pipeline, loras, digests)
        for network in (denoiser, vae):
            if network is not None:  # NHWC: what tensor cores want, and a tenth to a third faster on CPUs
                network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        try_networks(folder, family, denoiser, vae)
        prompt, labels = folder.facts()
        scheduler = folder.configs["scheduler"]
        return cls(
            denoiser=denoiser,
            vae=vae,
            family=family,
            scheduler_config=scheduler,
            prediction_type=scheduler.get("prediction_type", "epsilon"),
            latent_channels=denoiser.config.in_channels,
            latent_size=_size(denoiser.config.sample_size),
            vae_scale_factor=_enlargement(vae),
            scaling_factor=1.0 if vae is None else float(vae.config.scaling_factor),
            shift_factor=0.0 if vae is None else float(vae.config.get("shift_factor") or 0.0),
            source=str(source),
            digests=digests,
            prompt=family.prompt if prompt is None else prompt,
            labels=labels,
            tokens=tokens,
            files={
                "revision": revision,
                "variant": variant,
                "offline": offline,
                "config": config,
                "lora": tuple(lora),
                "textual_inversion": tuple(textual_inversion),
            },
        )

    def to(self, device: torch.device | str) -> Self:
        """The networks moved in place; returns self."""
        for network in (self.denoiser, self.vae):
            if network is not None:
                network.to(device)
        self.family.to(device)
        return self

    @property
    def device(self) -> torch.device:
        device: torch.device = self.denoiser.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.denoiser.dtype
        return dtype

    @property
    def pixels(self) -> bool:
        """Whether it denoises the image itself."""
        return self.vae is None

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All that it is made of, by part."""
        found = {self.family.part: self.denoiser, "vae": self.vae, **self.family.encoders}
        return {part: network for part, network in found.items() if network is not None}

    def conditions(self, prompts: Sequence[str], side: int = 0, cfg: float = 1.0) -> tuple[Tensor, ...]:
        """What the denoiser takes beside latents and time for B prompts: tensors [B, ...], named by `family.inputs`.

        side: of the image in pixels, 0: the trained one. cfg: the guidance scale, for networks that take it as an
        input. Raises EngineError for a prompt that it cannot take.
        """
        return self.family.conditions(prompts, side or self._side(), cfg)

    def unconditional(self, prompt: str = "", side: int = 0) -> tuple[Tensor, ...]:
        """Condition tensors [1, ...] of the rows that classifier-free guidance moves away from, ordered as `conditions`
        gives them. prompt: the negative one."""
        return self.family.unconditional(prompt, side or self._side())

    def _side(self) -> int:
        """The trained side of the image. Raises EngineError where it is not known."""
        if self.latent_size is None:
            raise EngineError(f"prior {self.source}", "its config states no size", "say the side of the images")
        return self.latent_size[0] * self.vae_scale_factor

    def denoise(self, z: Tensor, t: Tensor | float, *conditions: Tensor) -> Tensor:
        """The denoiser's prediction (of prediction_type), shape and dtype of z.

        z: latents [B, C, h, w], any floating dtype; computed in the networks' own.
        t: timestep, one number or [B]. conditions: [B, ...] each, in the order of `family.inputs`.
        """
        dtype = self.dtype
        given = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in conditions]
        return self.family.predict(self.denoiser, z.to(dtype), t, *given).to(z.dtype)

    def decode(self, z0: Tensor) -> Tensor:
        """Clean latents [B, C, h, w] -> images [B, 3, H, W] in 0..1, differentiable, in the dtype of z0."""
        decoded = z0
        if self.vae is not None:
            latents = z0 / self.scaling_factor + self.shift_factor
            decoded = self.vae.decode(latents.to(self.vae.dtype)).sample
        return (decoded.to(z0.dtype) / 2 + 0.5).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 -> clean latents [B, C, h, w], in their dtype: the mean of the encoder's answer.

        Raises EngineError for a VAE without an encoder.
        """
        z0 = 2 * images - 1
        if self.vae is None:
            return z0
        if isinstance(getattr(self.vae, "encoder", None), nn.Identity | None):
            what = f"the {type(self.vae).__name__} of the prior {self.source}"
            raise EngineError(what, "it has no encoder", "use a prior whose VAE has one")
        answer = self.vae.encode(z0.to(self.vae.dtype))
        latents: Tensor = answer.latent_dist.mean if hasattr(answer, "latent_dist") else answer.latents
        return (latents.to(images.dtype) - self.shift_factor) * self.scaling_factor

    def doubled(self) -> "Prior":
        """A copy whose denoiser and VAE are float64, with torch's attention and group norms: what others are judged
        by."""
        denoiser, vae = (copy.deepcopy(network) for network in (self.denoiser, self.vae))
        for network in (denoiser, vae):
            if network is not None:
                network.double()
                set_attention(network, "sdpa")  # xformers has no float64
                set_group_norms(network, "torch")
        return replace(self, denoiser=denoiser, vae=vae)


def check_source(
    source: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    offline: bool = False,
    config: str | None = None,
    lora: Sequence[str] = (),
    textual_inversion: Sequence[str] = (),
) -> None:
    """Raise EngineError for a source that is none, or whose folder lacks a part or has configs that cannot be, without
    loading or fetching any. Its arguments are those of `Prior.from_pretrained`.
    """
    place = PriorSource(source, revision, variant, offline, config)
    for text in lora:
        Added.lora(text)
    for text in textual_inversion:
        Added.inversion(text)
    if place.here():
        _complete(open_prior(place))
    elif (file := place.single_file()) is not None:
        check_file(file)


def _complete(folder: PriorFolder) -> type[Family]:
    """The family of a folder. Raises EngineError where it has none, lacks a part, or has a config that cannot be."""
    family = family_of(folder)
    folder.require(family.part, *family.requires)
    folder.facts()
    for part in folder.networks:
        folder.check(part)
    return family


def _digests(folder: PriorFolder, family: Family) -> dict[str, str]:
    """SHA-256 by part of all that was loaded, "conditions" included."""
    digests = folder.digests((family.part, *(["vae"] if family.vaes else []), *family.encoders))
    if family.facts:
        digests["conditions"] = hashlib.sha256(json.dumps(family.facts, sort_keys=True).encode()).hexdigest()
    return digests


def _size(sample_size: Any) -> tuple[int, int] | None:
    """(h, w) of a config's sample_size: a side, both, or none."""
    if sample_size is None or isinstance(sample_size, int):
        return None if sample_size is None else (sample_size, sample_size)
    return sample_size[0], sample_size[1]


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        why = f"known are {', '.join(DTYPES)}, or a torch.dtype"
        raise EngineError(f"the dtype {dtype!r} is unknown", why, "choose one of them")
    return DTYPES[dtype]


def _vae_class(folder: PriorFolder) -> str:
    return str(folder.configs["vae"].get("_class_name"))


def _vae_dtype(folder: PriorFolder, family: type[Family], vae_class: Any, dtype: torch.dtype) -> torch.dtype:
    """The VAE's dtype beside a denoiser of `dtype`: its config, or else its class, says whether float16 will do."""
    default = inspect.signature(vae_class).parameters["force_upcast"].default
    forced = folder.configs["vae"].get("force_upcast", default)
    return torch.float32 if dtype == torch.float16 and family.upcasts and forced else dtype


def _enlargement(vae: Any) -> int:
    """Image side over latent side."""
    return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


def _check(folder: PriorFolder, family: Family) -> None:
    """Raise EngineError where denoiser, VAE and what dfkd.json states do not fit one another."""
    if folder.configs["dfkd"].get("null_class") is not None and family.null_class is None:
        raise family.refuse(folder, "dfkd.json states a null_class", f"{family.name} has no use for it", "leave it out")
    if folder.configs["dfkd"].get("patch_size") is not None and family.patches is None:
        raise family.refuse(folder, "dfkd.json states a patch_size", f"{family.name} has no use for it", "leave it out")
    own, vae = family.config, folder.configs.get("vae", {})
    if family.vaes:
        if (named := _vae_class(folder)) not in family.vaes:
            raise family.refuse(folder, f"vae is a {named}", f"want one of {', '.join(family.vaes)}")
        taken = own.get("in_channels", 4)
        given = own.get("out_channels") or taken
        latent = vae.get("latent_channels", 4)
        if taken != latent or given not in family.gives(taken):
            fact = f"{family.part} takes {taken} and gives {given} channels"
            raise family.refuse(folder, fact, f"the VAE's latents have {latent}")
