"""A Stable Diffusion pipeline's networks, frozen: from a folder or a Hugging Face hub id to a `Prior`.

The folder's layout is that of engine/prior_folder.py. No safety checker is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfkd_engine.prior_folder import CONFIGS, WEIGHTS, PriorError, digest, locate, read_config, weight_files
from dfkd_kernels.rows import NetworkInput

# diffusers and transformers take seconds to load: they are imported in the functions that need them, so that whoever
# imports this module for its types alone, as a command that only shows its --help, need not wait.
if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTokenizer

_DECODERS = ("AutoencoderKL", "AutoencoderTiny")


@dataclass(frozen=True, eq=False)
class Prior:
    """Frozen networks of a latent diffusion model, in evaluation mode, without gradients to their weights.

    scheduler_config: content of scheduler_config.json; prediction_type is its entry ("epsilon" where it has none).
    latent_channels, latent_size: C and the trained (h, w) of the latents.
    vae_scale_factor: image side over latent side.
    scaling_factor: s; the denoiser works on s (encoded - shift), the decoder on latents / s + shift.
    source: as the caller wrote it. weights_digest: SHA-256 over the safetensors files.
    """

    unet: Any  # UNet2DConditionModel
    vae: Any  # AutoencoderKL or AutoencoderTiny; diffusers gives neither a typed config nor a typed call
    text_encoder: Any  # CLIPTextModel
    tokenizer: "CLIPTokenizer"
    scheduler_config: dict[str, Any]
    prediction_type: str
    latent_channels: int
    latent_size: tuple[int, int]
    vae_scale_factor: int
    scaling_factor: float
    source: str
    weights_digest: str
    _encoded: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.unet.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.unet.dtype
        return dtype

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [B, L, D] of B prompts, padded or cut to the tokenizer's length L.

        Each text is encoded once, by itself, so that its embedding does not depend on what it came with.
        """
        for prompt in set(prompts) - self._encoded.keys():
            self._encoded[prompt] = self._encode(prompt)
        return torch.stack([self._encoded[prompt] for prompt in prompts])

    @torch.no_grad()
    def _encode(self, prompt: str) -> Tensor:
        tokens = self.tokenizer(
            prompt,
            padding="max_length",
            max_length=min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings),
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        # As in diffusers: Stable Diffusion was trained attending to the padding; a few text encoders say otherwise.
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        hidden = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None)
        embedding: Tensor = hidden.last_hidden_state[0]
        return embedding

    def denoise(self, z: Tensor, t: Tensor | float, context: Tensor) -> Tensor:
        """The UNet's prediction (of prediction_type), like z.

        z: latents [B, C, h, w], any floating dtype; computed in the networks' own.
        t: timestep, one number or [B]. context: text embeddings [B, L, D].
        """
        output: Tensor = self.unet(z.to(self.dtype), t, encoder_hidden_states=context.to(self.dtype)).sample
        return output.to(z.dtype)

    @property
    def unet_input(self) -> NetworkInput:
        """What the UNet takes without a conversion of its own."""
        return NetworkInput(self.dtype, torch.channels_last)

    @property
    def decoder_input(self) -> NetworkInput:
        """What the VAE's decoder takes in the place of clean latents."""
        return NetworkInput(self.dtype, torch.channels_last, self.scaling_factor, self._shift)

    @property
    def _shift(self) -> float:
        return float(self.vae.config.get("shift_factor") or 0.0)

    def decode(self, z0: Tensor) -> Tensor:
        """Clean latents [B, C, h, w] -> images [B, 3, H, W] in 0..1, differentiable, in the dtype of z0."""
        latents = z0 / self.scaling_factor + self._shift
        return self._image(latents.to(self.dtype), z0.dtype)

    def decode_input(self, x: Tensor) -> Tensor:
        """The same of latents as `decoder_input` says, in float32 at least."""
        return self._image(x, torch.promote_types(x.dtype, torch.float32))

    def _image(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        decoded: Tensor = self.vae.decode(x).sample
        return (decoded.to(dtype) / 2 + 0.5).clamp(0, 1)


def load_prior(source: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Prior:
    """Load a prior from a folder or a hub id ("owner/name", fetched into the hub's cache on first use).

    Raises:
        PriorError: no such folder or id, a part is missing, a network of another kind, or parts that do not fit.
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = locate(source)
    configs = {part: read_config(folder, part, name) for part, name in CONFIGS.items()}
    text_config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    _check(source, configs, text_config)
    files = {part: weight_files(folder, part, stem) for part, stem in WEIGHTS.items()}
    tokenizer = _load_tokenizer(folder)

    unet = _load(diffusers.UNet2DConditionModel, folder, "unet", torch_dtype=dtype)
    vae = _load(getattr(diffusers, configs["vae"]["_class_name"]), folder, "vae", torch_dtype=dtype)
    text_encoder = _load(CLIPTextModel, folder, "text_encoder", dtype=dtype)
    for network in (unet, vae, text_encoder):
        network.to(device).eval().requires_grad_(False)
    for network in (unet, vae):  # NHWC: what tensor cores want, and a tenth to a third faster on CPUs
        network.to(memory_format=torch.channels_last)

    size = unet.config.sample_size
    scheduler = configs["scheduler"]
    return Prior(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler_config=scheduler,
        prediction_type=scheduler.get("prediction_type", "epsilon"),
        latent_channels=unet.config.in_channels,
        latent_size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1),
        scaling_factor=float(vae.config.scaling_factor),
        source=str(source),
        weights_digest=digest(folder, [path for part in files.values() for path in part]),
    )


def _check(source: str | Path, configs: dict[str, dict[str, Any]], text: "CLIPTextConfig") -> None:
    """Raise PriorError where the configs are not of one Stable Diffusion 1 or 2 text-to-image model."""
    unet, vae = configs["unet"], configs["vae"]
    needs = "Use a prior of the Stable Diffusion 1 or 2 kind"

    def refuse(fact: str, why: str) -> None:
        raise PriorError(f"prior {source}: {fact}", why, needs)

    if unet.get("_class_name") != "UNet2DConditionModel":
        refuse(f"unet is a {unet.get('_class_name')}", "want a UNet2DConditionModel")
    if vae.get("_class_name") not in _DECODERS:
        refuse(f"vae is a {vae.get('_class_name')}", f"want one of {', '.join(_DECODERS)}")
    architectures = configs["text_encoder"].get("architectures") or ["CLIPTextModel"]
    if architectures != ["CLIPTextModel"]:
        refuse(f"text_encoder is a {', '.join(architectures)}", "want a CLIPTextModel")
    for option in ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim"):
        if unet.get(option) is not None:
            refuse(f"unet has {option} = {unet[option]}", "it wants inputs beside latents, time and text")
    context, hidden = unet.get("cross_attention_dim", 1280), text.hidden_size
    if context != hidden:
        refuse(f"unet's cross_attention_dim is {context}", f"its text encoder makes embeddings of width {hidden}")
    channels = (unet.get("in_channels", 4), unet.get("out_channels", 4), vae.get("latent_channels", 4))
    if len(set(channels)) > 1:
        refuse(f"unet takes {channels[0]} and gives {channels[1]} channels", f"the VAE's latents have {channels[2]}")
    if unet.get("sample_size") is None:
        refuse("unet's config has no sample_size", "the size of the latents it was trained on is unknown")


def _load(network: Any, folder: Path, part: str, **options: Any) -> Any:
    """One network with every weight from its files; diffusers and transformers alone would only warn."""
    try:
        loaded, info = network.from_pretrained(folder / part, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise PriorError(f"{folder / part}", f"could not be loaded ({error})", "Fetch the prior again") from error
    absent = sorted(info["missing_keys"])
    if absent:
        why = f"{len(absent)} weights are not in its files, first {absent[0]}"
        raise PriorError(f"{folder / part}", why, "Fetch the prior again")
    return loaded


def _load_tokenizer(folder: Path) -> "CLIPTokenizer":
    part = folder / "tokenizer"
    names = {path.name for path in part.glob("*")}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        why = "tokenizer/ has neither tokenizer.json nor vocab.json with merges.txt"
        raise PriorError(f"prior {folder}", why, "Fetch the prior again, its tokenizer/ included")
    from transformers import CLIPTokenizer

    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(part)
    return tokenizer
