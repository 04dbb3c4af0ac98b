"""The parts of a pipeline that exists, to be trained further: all weights of its UNet, its text encoder too, or LoRA.

LoRA (arXiv:2106.09685) adds W + B A to the projections of attention and trains A and B alone; peft does it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dfkd.config import PriorTrainConfig
from dfkd.errors import UsageError
from dfkd.training.conditions import ClassNumbers, Conditions, Words
from dfkd.training.denoising import FLOW, Denoising
from dfkd.training.prior_parts import Parts, labels_of, placed, side_factor
from dfkd.training.prompt_tokens import Prompts
from dfkd_engine.priors.families.unet2d import patches_of
from dfkd_engine.priors.folder import PriorFolder
from dfkd_engine.priors.opening import open_prior
from dfkd_engine.priors.source import PriorSource

TEXT, BARE = "UNet2DConditionModel", "UNet2DModel"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # as diffusers' save_lora_weights calls it
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def open_existing(place: PriorSource, config: PriorTrainConfig, size: int | None) -> tuple[PriorFolder, int]:
    """The pipeline's folder, fetched where it is on the hub, and the side of its images.

    Raises UsageError for a pipeline that cannot be trained here or with these settings, and EngineError for one that
    cannot be read.
    """
    folder, source = open_prior(place), place.name
    unet = folder.configs.get("unet", {})
    kind = unet.get("_class_name")
    if kind not in (TEXT, BARE) or "text_encoder_2" in folder.configs or unet.get("time_cond_proj_dim") is not None:
        what = f"--prior {source} is a pipeline with a {kind or 'transformer'}"
        why = "trained further are UNet2DConditionModel with one CLIP text encoder, and UNet2DModel"
        raise UsageError(what, why, "choose another prior")
    text = kind == TEXT
    folder.require("unet", *(("text_encoder", "tokenizer", "vae") if text else ()))
    for part in folder.networks:
        folder.check(part)
    asked = config.changed()
    idle = {"lora_rank", "train_text_encoder", "prompts", "free_prompts"} if not text else set()
    if not text and unet.get("num_class_embeds") is None:
        idle |= {"drop"}
    if unused := sorted(idle & asked.keys()):
        flag = "--" + unused[0].replace("_", "-")
        raise UsageError(f"{flag} with --prior {source}", "it has no text encoder", "leave it out")
    if text and folder.configs["text_encoder"].get("use_attention_mask"):
        raise UsageError(
            f"--prior {source}", "its text encoder masks padding, which is not trained here", "use another"
        )
    scheduler = folder.configs["scheduler"]
    if scheduler.get("_class_name") != FLOW and scheduler.get("prediction_type", "epsilon") not in PREDICTIONS:
        why = f"its prediction_type is {scheduler['prediction_type']}, known are {', '.join(PREDICTIONS)}"
        raise UsageError(f"--prior {source}", why, "use another")
    if unet.get("in_channels") != unet.get("out_channels"):
        raise UsageError(
            f"--prior {source}", "its UNet predicts a variance too, which is not trained here", "use another"
        )
    return folder, _side(folder, size)


def existing_parts(
    folder: PriorFolder, config: PriorTrainConfig, size: int, names: Sequence[str], device: torch.device
) -> Parts:
    """The pipeline's networks on the device in float32; what does not learn is frozen.

    Raises UsageError where the images' classes are not those that a class-conditional UNet numbers.
    """
    import diffusers
    from transformers import CLIPTextModel, CLIPTokenizer

    text = folder.configs["unet"]["_class_name"] == TEXT
    kind = {"torch_dtype": torch.float32}
    denoiser = folder.load(getattr(diffusers, TEXT if text else BARE), "unet", **kind)
    vae = None
    if "vae" in folder.configs:
        vae = folder.load(getattr(diffusers, folder.configs["vae"]["_class_name"]), "vae", **kind)
        vae = placed(vae.eval().requires_grad_(False), device)
    elif (patches := patches_of(folder)) is not None:
        vae = placed(patches, device)
    scheduler = _scheduler(folder)
    labels = labels_of(names)
    text_encoder = tokenizer = None
    conditions: Conditions = Conditions()
    if text:
        text_encoder = folder.load(CLIPTextModel, "text_encoder", dtype=torch.float32).to(device)
        text_encoder.requires_grad_(config.train_text_encoder).eval()
        tokenizer = folder.load_tokenizer(CLIPTokenizer, "tokenizer")
        known = folder.facts()[1]
        words = tuple(dict.fromkeys((*known, *labels))) if known else ()
        conditions = Words(
            Prompts(config.prompts, config.free_prompts, names),
            config.prompts[0],
            words,
            tokenizer,
            min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings),
            device,
            None if config.train_text_encoder else text_encoder,
        )
    elif (embeddings := denoiser.config.num_class_embeds) is not None:
        conditions = _numbered(folder, embeddings, labels, device)
    if config.lora_rank:
        _add_lora(denoiser, config)
    denoising = Denoising(denoiser, scheduler, text_encoder if config.train_text_encoder else None)
    side = size // (1 if vae is None else side_factor(vae))
    channels = int(denoiser.config.in_channels)
    return Parts(placed(denoising, device), scheduler, conditions, vae, text_encoder, tokenizer, channels, side, size)


def save_lora(out: Path, denoiser: Any) -> None:
    """Write out/pytorch_lora_weights.safetensors, for --lora of dfkd-generate and diffusers' load_lora_weights."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(denoiser))
    kept = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=kept, weight_name=LORA_WEIGHTS)


def _add_lora(denoiser: Any, config: PriorTrainConfig) -> None:
    from peft import LoraConfig

    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.train.seed)
        rank = config.lora_rank
        denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS))


def _scheduler(folder: PriorFolder) -> Any:
    import diffusers

    config = folder.configs["scheduler"]
    return getattr(diffusers, config["_class_name"]).from_config(config)


def _numbered(folder: PriorFolder, embeddings: int, labels: tuple[str, ...], device: torch.device) -> ClassNumbers:
    known, null_class = folder.facts()[1], folder.configs["dfkd"].get("null_class")
    if null_class != embeddings - 1 or known != labels:
        why = f"its {embeddings} class embeddings are of {', '.join(known[:10]) or 'no stated classes'}"
        todo = "give images of its classes in their order (?classes=A,B behind the data), and a prior with a null class"
        raise UsageError(f"--prior {folder.path} with images of {', '.join(labels[:10])}", why, todo)
    return ClassNumbers(labels, device)


def _side(folder: PriorFolder, size: int | None) -> int:
    """The side of the images: `size`, or the prior's own. Raises UsageError where its networks cannot take it."""
    unet = folder.configs["unet"]
    vae = folder.configs.get("vae")
    factor = folder.configs["dfkd"].get("patch_size") or 1
    if vae is not None:
        factor = 2 ** (len(vae.get("block_out_channels") or vae.get("decoder_block_out_channels", ())) - 1)
    deepest = factor * 2 ** (len(unet.get("block_out_channels", ())) - 1)
    own = unet.get("sample_size")
    side = size or (own if isinstance(own, int) else 0) * factor
    if not side:
        raise UsageError("--size is missing", "the prior does not state the side of its images", "give it")
    if side % deepest:
        raise UsageError(f"--size {side}", f"the prior's networks want a multiple of {deepest}", "choose one")
    return int(side)
