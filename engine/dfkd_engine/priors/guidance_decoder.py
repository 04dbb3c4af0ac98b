"""A second decoder of a prior's latents, such as a tiny one, for guidance to differentiate; images come from the VAE.

Its folder is what diffusers' AutoencoderTiny or AutoencoderKL saves, itself or its vae/; an encoder need not be there.
"""

import copy
import hashlib
import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dfkd_engine.attention import set_attention
from dfkd_engine.errors import EngineError, first_line
from dfkd_engine.files import sha256_once
from dfkd_engine.group_norms import set_group_norms
from dfkd_engine.priors.prior import Prior
from dfkd_engine.priors.weights import read_json

KINDS = ("AutoencoderTiny", "AutoencoderKL")
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_TODO = "give a folder of dfkd-train-decoder, or of an AutoencoderTiny for the same latents"


@dataclass(frozen=True, eq=False)
class Decoder:
    """A frozen decoder, on its device.

    network: AutoencoderTiny or AutoencoderKL without its encoder. scaling_factor, shift_factor: of its own config; it
    decodes z0 / scaling_factor + shift_factor, where z0 is what the prior's denoiser works on. latent_channels, factor:
    C, and image side over latent side. source: as the caller wrote it. digest: SHA-256 of config and weights.
    """

    network: Any
    scaling_factor: float
    shift_factor: float
    latent_channels: int
    factor: int
    source: str
    digest: str

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        offline: bool = False,
    ) -> Self:
        """Load a decoder. source: a folder, or a hub id, fetched on first use unless `offline`. Raises EngineError:
        there is none, it is damaged, or it is no decoder."""
        import diffusers  # which takes seconds to load
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = _folder(source, offline)
        config: dict[str, Any] = dict(read_json(folder / CONFIG))
        kind = config.get("_class_name")
        if kind not in KINDS:
            raise EngineError(f"decoder {source} is a {kind}", f"want one of {', '.join(KINDS)}", _TODO)
        try:
            made = getattr(diffusers, kind)
            known = inspect.signature(made).parameters  # saved configs have entries that follow from others
            network = made(**{name: value for name, value in config.items() if name in known})
            missing, unknown = network.load_state_dict(load_file(folder / WEIGHTS), strict=False)
        except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
            raise EngineError(f"decoder {folder}", f"could not be loaded ({first_line(error)})", _TODO) from error
        absent = [name for name in missing if not name.startswith(("encoder.", "quant_conv."))]
        if absent or unknown:
            what = f"{(absent or unknown)[0]} is {'not in its file' if absent else 'no weight of it'}"
            raise EngineError(f"decoder {folder}", what, _TODO)
        network.encoder = nn.Identity()  # nothing here encodes
        # By torch's own `to`: that of diffusers warns of what it might leave out.
        nn.Module.to(network.eval().requires_grad_(False), device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        widths = config.get("block_out_channels") or config["decoder_block_out_channels"]
        digests = " ".join(sha256_once(folder / name) for name in (CONFIG, WEIGHTS))
        return cls(
            network=network,
            scaling_factor=float(network.config.scaling_factor),
            shift_factor=float(network.config.get("shift_factor") or 0.0),
            latent_channels=int(network.config.latent_channels),
            factor=2 ** (len(widths) - 1),
            source=str(source),
            digest=hashlib.sha256(digests.encode()).hexdigest(),
        )

    def check(self, prior: Prior) -> None:
        """Raise EngineError where it is not for the prior's latents."""
        what = f"decoder {self.source} does not fit the prior {prior.source}"
        if prior.pixels:
            raise EngineError(what, "that one is of pixels, and has no decoder", "leave it out")
        own, wanted = (self.latent_channels, self.factor), (prior.latent_channels, prior.vae_scale_factor)
        if own != wanted:
            why = (
                f"it enlarges latents of {own[0]} channels {own[1]} times, the prior's have {wanted[0]} and {wanted[1]}"
            )
            raise EngineError(what, why, "give one for the same latents")

    def __call__(self, z0: Tensor) -> Tensor:
        """Clean latents [B, C, h, w] -> images [B, 3, H, W] in 0..1, differentiable, in the dtype of z0."""
        latents = z0 / self.scaling_factor + self.shift_factor
        decoded: Tensor = self.network.decode(latents.to(self.network.dtype)).sample
        return (decoded.to(z0.dtype) / 2 + 0.5).clamp(0, 1)

    def doubled(self) -> "Decoder":
        """A copy in float64, with torch's attention and group norms: what others are judged by."""
        network = copy.deepcopy(self.network).double()
        set_attention(network, "sdpa")
        set_group_norms(network, "torch")
        return replace(self, network=network)


def check_decoder(source: str | Path) -> None:
    """Raise EngineError where `source` is no folder of a decoder; of a hub id nothing is said, and none is fetched."""
    if Path(source).expanduser().is_dir() or str(source).count("/") != 1:
        _folder(source)


def _folder(source: str | Path, offline: bool = False) -> Path:
    """The folder with config and weights."""
    path = Path(source).expanduser()
    if not path.is_dir():
        if isinstance(source, Path) or path.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1:
            raise EngineError(f"decoder {source}", "no such folder, and a hub id has the form owner/name", _TODO)
        from huggingface_hub import snapshot_download

        wanted = [f"{place}{name}" for place in ("", "vae/") for name in (CONFIG, WEIGHTS)]
        try:
            path = Path(snapshot_download(str(source), allow_patterns=wanted, local_files_only=offline))
        except (OSError, ValueError) as error:  # the hub's errors are all of these two kinds
            why = f"no folder of that name, and it could not be fetched from the hub ({first_line(error)})"
            raise EngineError(f"decoder {source}", why, _TODO) from error
    home = path if (path / CONFIG).is_file() or not (path / "vae").is_dir() else path / "vae"
    if absent := [name for name in (CONFIG, WEIGHTS) if not (home / name).is_file()]:
        raise EngineError(f"decoder {source}", f"{home / absent[0]} is missing", _TODO)
    return home
