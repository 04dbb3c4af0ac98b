"""A Stable Diffusion pipeline's networks, frozen: from a folder, a hub id or an embedded name to a `Prior`.

Layout of the folder (what diffusers' `StableDiffusionPipeline.save_pretrained` writes):

    unet/ vae/           config.json and diffusion_pytorch_model*.safetensors
    text_encoder/        config.json and model*.safetensors
    tokenizer/           tokenizer.json, or vocab.json and merges.txt
    scheduler/           scheduler_config.json
    dfkd.json            optional, ours: {"prompt": "a photo of the digit {label}", "labels": ["zero", "one", ...]}

Weights are read from safetensors only: a pickled file can run code. No safety checker is loaded.
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from dfkd_engine import EMBEDDED
from dfkd_engine.attention import set_attention
from dfkd_engine.errors import EngineError, first_line
from dfkd_engine.files import sha256_once
from dfkd_engine.group_norms import set_group_norms

# diffusers and transformers take seconds to load: they are imported in the functions that need them.
if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTokenizer

__all__ = ["DTYPES", "EMBEDDED", "Prior", "check_source", "component_digests"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

PROMPT = "a photo of a {label}"  # the template of CLIP's authors, which suits any photo prior
FACTS = "dfkd.json"

_WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_CONFIGS = {**dict.fromkeys(_WEIGHTS, "config.json"), "scheduler": "scheduler_config.json"}
_DECODERS = ("AutoencoderKL", "AutoencoderTiny")
_LAYOUT = "a folder in Stable Diffusion layout (unet/, vae/, text_encoder/, tokenizer/, scheduler/)"
_POINT = f"point to {_LAYOUT}"
_FETCH = "fetch the prior again"


@dataclass(frozen=True, eq=False)
class Prior:
    """Frozen networks of a latent diffusion model, in evaluation mode, without gradients to their weights.

    scheduler_config: content of scheduler_config.json; prediction_type is its entry ("epsilon" where it has none).
    latent_channels, latent_size: C and the trained (h, w) of the latents.
    vae_scale_factor: image side over latent side.
    scaling_factor: s; the denoiser works on s (encoded - shift), the decoder on latents / s + shift.
    source: as the caller wrote it.
    digests: SHA-256 by component: unet, vae and text_encoder (weights and config), tokenizer, scheduler.
    prompt: template of a prompt that suits it. labels: the only words for {label} that it was trained on, () for any.
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
    digests: Mapping[str, str]
    prompt: str = PROMPT
    labels: tuple[str, ...] = ()
    _encoded: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu"
    ) -> Self:
        """Load a prior.

        source: a folder, a hub id ("owner/name", fetched into the hub's cache on first use), or a name in EMBEDDED.
        dtype: of the networks; also "fp32", "bf16" or "fp16".

        Raises EngineError: no such folder or id, a part is missing, a network of another kind, or parts that do not
        fit.
        """
        import diffusers
        from transformers import CLIPTextConfig, CLIPTextModel

        kind = _dtype(dtype)
        folder = _locate(source)
        configs = {part: _read_config(folder, part) for part in _CONFIGS}
        _check(source, configs, CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        digests = component_digests(folder)  # first of all: it says what is missing
        tokenizer = _load_tokenizer(folder)
        unet = _load(diffusers.UNet2DConditionModel, folder, "unet", torch_dtype=kind)
        vae = _load(getattr(diffusers, configs["vae"]["_class_name"]), folder, "vae", torch_dtype=kind)
        text_encoder = _load(CLIPTextModel, folder, "text_encoder", dtype=kind)
        for network in (unet, vae, text_encoder):
            network.to(device).eval().requires_grad_(False)
        for network in (unet, vae):  # NHWC: what tensor cores want, and a tenth to a third faster on CPUs
            network.to(memory_format=torch.channels_last)

        size = unet.config.sample_size
        return cls(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler_config=configs["scheduler"],
            prediction_type=configs["scheduler"].get("prediction_type", "epsilon"),
            latent_channels=unet.config.in_channels,
            latent_size=(size, size) if isinstance(size, int) else (size[0], size[1]),
            vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1),
            scaling_factor=float(vae.config.scaling_factor),
            source=str(source),
            digests=digests,
            **_facts(folder / FACTS),
        )

    def to(self, device: torch.device | str) -> Self:
        """The networks moved in place; returns self."""
        for network in (self.unet, self.vae, self.text_encoder):
            network.to(device)
        self._encoded.clear()
        return self

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
        """The UNet's prediction (of prediction_type), shape and dtype of z.

        z: latents [B, C, h, w], any floating dtype; computed in the networks' own.
        t: timestep, one number or [B]. context: text embeddings [B, L, D].
        """
        output: Tensor = self.unet(z.to(self.dtype), t, encoder_hidden_states=context.to(self.dtype)).sample
        return output.to(z.dtype)

    def decode(self, z0: Tensor) -> Tensor:
        """Clean latents [B, C, h, w] -> images [B, 3, H, W] in 0..1, differentiable, in the dtype of z0."""
        latents = z0 / self.scaling_factor + float(self.vae.config.get("shift_factor") or 0.0)
        decoded: Tensor = self.vae.decode(latents.to(self.dtype)).sample
        return (decoded.to(z0.dtype) / 2 + 0.5).clamp(0, 1)

    def doubled(self) -> "Prior":
        """A copy whose UNet and VAE are float64, with torch's attention and group norms: what others are judged by."""
        unet, vae = (copy.deepcopy(network).double() for network in (self.unet, self.vae))
        for network in (unet, vae):
            set_attention(network, "sdpa")  # xformers has no float64
            set_group_norms(network, "torch")
        return replace(self, unet=unet, vae=vae)


def check_source(source: str | Path) -> None:
    """Raise EngineError for a source that is none, or whose folder lacks a part, without loading or fetching any."""
    if (folder := _local(source)) is None:
        return
    for part in _CONFIGS:
        _read_config(folder, part)
    for part in _WEIGHTS:
        _weights(folder, part)
    _tokenizer(folder)


def _local(source: str | Path) -> Path | None:
    """The folder of an embedded prior, or `source` itself; None for a hub id. Raises EngineError for none of them."""
    name, folder = str(source), Path(source).expanduser()
    if name in EMBEDDED:
        return EMBEDDED[name]
    if folder.is_dir():
        return folder
    if isinstance(source, Path) or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        known = f", embedded are {', '.join(EMBEDDED)}" if EMBEDDED else ""
        raise EngineError(f"prior {name}", f"no such folder, and a hub id has the form owner/name{known}", _POINT)
    return None


def _locate(source: str | Path) -> Path:
    """The folder that `source` names: an embedded prior's, its own, or the hub's cached copy of the parts needed.

    Raises EngineError: no such folder, and no hub id that can be fetched.
    """
    if (folder := _local(source)) is not None:
        return folder
    name = str(source)
    wanted = ["*/config.json", "scheduler/*.json", "tokenizer/*", FACTS]
    wanted += [f"{part}/{stem}{end}" for part, stem in _WEIGHTS.items() for end in (".safetensors*", "-*.safetensors")]
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # the hub's errors are all of these two kinds
        why = f"no folder of that name, and it could not be fetched from the Hugging Face hub ({first_line(error)})"
        todo = f"check the id and the network, or fetch it elsewhere and {_POINT}"
        raise EngineError(f"prior {name}", why, todo) from error


def _read_config(folder: Path, part: str) -> dict[str, Any]:
    """The config of one component, a key of _CONFIGS. Raises EngineError where it is missing or not JSON."""
    path = folder / part / _CONFIGS[part]
    if not path.is_file():
        raise EngineError(f"prior {folder}", f"{part}/{_CONFIGS[part]} is missing", f"a prior is {_LAYOUT}")
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise EngineError(str(path), f"not JSON of an object ({error})", _FETCH) from error


def _facts(path: Path) -> dict[str, Any]:
    """Prompt and labels that a prior's folder states of itself, {} where it states none. Raises EngineError."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        prompt, labels = found.get("prompt", PROMPT), found.get("labels", [])
        if not isinstance(prompt, str) or not all(isinstance(label, str) for label in labels):
            raise TypeError("prompt is a text, labels are a list of texts")
    except (ValueError, TypeError, AttributeError) as error:
        raise EngineError(str(path), f"it does not describe a prior ({error})", "correct it") from error
    return {"prompt": prompt, "labels": tuple(labels)}


def component_digests(folder: Path) -> dict[str, str]:
    """SHA-256 by component: the names and bytes of its weights and config, or of all files of the tokenizer.

    Files are read once a process. Raises EngineError where a network's weights or the tokenizer are missing.
    """
    parts = {part: [folder / part / _CONFIGS[part], *_weights(folder, part)] for part in _WEIGHTS}
    parts["tokenizer"] = _tokenizer(folder)
    parts["scheduler"] = [folder / "scheduler" / _CONFIGS["scheduler"]]
    return {part: _digest(folder, files) for part, files in parts.items()}


def _digest(folder: Path, files: Iterable[Path]) -> str:
    lines = [f"{path.relative_to(folder).as_posix()} {sha256_once(path)}\n" for path in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _weights(folder: Path, part: str) -> list[Path]:
    """The safetensors files of one network, sorted."""
    stem = _WEIGHTS[part]
    whole = folder / part / f"{stem}.safetensors"
    files = [whole] if whole.is_file() else sorted((folder / part).glob(f"{stem}-*-of-*.safetensors"))
    if not files:
        found = sorted(p.name for p in (folder / part).glob("*") if p.suffix != ".json")
        why = f"{part}/{stem}.safetensors is missing ({part}/ holds {', '.join(found) or 'no weights'})"
        todo = "save the pipeline again with diffusers' save_pretrained, in full precision and as safetensors"
        raise EngineError(f"prior {folder}", why, todo)
    return files


def _tokenizer(folder: Path) -> list[Path]:
    files = [path for path in (folder / "tokenizer").glob("*") if path.is_file()]
    names = {path.name for path in files}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        why = "tokenizer/ has neither tokenizer.json nor vocab.json with merges.txt"
        raise EngineError(f"prior {folder}", why, f"{_FETCH}, its tokenizer/ included")
    return files


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        why = f"known are {', '.join(DTYPES)}, or a torch.dtype"
        raise EngineError(f"the dtype {dtype!r} is unknown", why, "choose one of them")
    return DTYPES[dtype]


def _check(source: str | Path, configs: dict[str, dict[str, Any]], text: "CLIPTextConfig") -> None:
    """Raise EngineError where the configs are not of one Stable Diffusion 1 or 2 text-to-image model."""
    unet, vae = configs["unet"], configs["vae"]

    def refuse(fact: str, why: str) -> None:
        raise EngineError(f"prior {source}: {fact}", why, "use a prior of the Stable Diffusion 1 or 2 kind")

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
        raise EngineError(f"{folder / part}", f"could not be loaded ({first_line(error)})", _FETCH) from error
    absent = sorted(info["missing_keys"])
    if absent:
        why = f"{len(absent)} weights are not in its files, first {absent[0]}"
        raise EngineError(f"{folder / part}", why, _FETCH)
    return loaded


def _load_tokenizer(folder: Path) -> "CLIPTokenizer":
    from transformers import CLIPTokenizer

    try:
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    except Exception as error:  # the tokenizers' library, which is not Python's, raises nothing narrower
        raise EngineError(f"{folder / 'tokenizer'}", f"could not be loaded ({first_line(error)})", _FETCH) from error
    return tokenizer
