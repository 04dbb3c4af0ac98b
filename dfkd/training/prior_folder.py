"""The folder of a finished prior: a diffusers pipeline, what dfkd.json says of it, and its model card."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfkd.errors import UsageError
from dfkd.files import replace_text
from dfkd.model_card import NOT_STATED, OURS, licence_of, listed, placeless, shown_names, table, write
from dfkd.training.autoencoder import STAGE, VAE
from dfkd.training.folder import holds_run
from dfkd.training.prior_existing import LORA_WEIGHTS
from dfkd.training.prior_parts import Parts
from dfkd_engine.priors.folder import FACTS
from dfkd_engine.priors.patches import Patches

INDEX = "model_index.json"  # the last file that is saved of a pipeline
CARD, PREVIEW = "README.md", "preview.png"
RESULTS = (INDEX, FACTS, CARD, PREVIEW, LORA_WEIGHTS, STAGE, VAE, "unet", "scheduler", "text_encoder", "tokenizer")


def refuse_foreign(out: Path, *sources: str | None) -> None:
    """Raise UsageError where `out` holds files of a prior that no training here has written, or is one of `sources`."""
    if any(source is not None and Path(source).resolve() == out.resolve() for source in sources):
        raise UsageError(f"--out {out} is what is read", "the prior would be overwritten", "choose another --out")
    found = [name for name in (INDEX, FACTS, "unet", VAE, LORA_WEIGHTS) if (out / name).exists()]
    if found and not holds_run(out) and not (out / "settings.json").exists():
        why = f"it has {found[0]}, and no training was begun there"
        raise UsageError(f"--out {out} holds something else", why, "choose another --out")


def save_pipeline(out: Path, parts: Parts, network: nn.Module, weights: str) -> None:
    """Write the pipeline with the weights of `network`, a Denoising; its parts are cast to `weights`, fp16 or fp32."""
    from diffusers import DDPMPipeline, StableDiffusionPipeline

    kind = torch.float16 if weights == "fp16" else torch.float32
    denoiser: Any = cast(network.denoiser, kind)
    if parts.tokenizer is None:
        if parts.vae is not None and not isinstance(parts.vae, Patches):
            cast(parts.vae, kind).save_pretrained(out / VAE)
        DDPMPipeline(denoiser, parts.scheduler).save_pretrained(out)
    else:
        text_encoder: Any = network.text_encoder if network.text_encoder is not None else parts.text_encoder
        pipeline = StableDiffusionPipeline(
            cast(parts.vae, kind),
            cast(text_encoder, kind),
            parts.tokenizer,
            denoiser,
            parts.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(out)
    patches = {"patch_size": parts.vae.patch_size} if isinstance(parts.vae, Patches) else {}
    if facts := {**parts.conditions.facts(), **patches}:
        replace_text(out / FACTS, json.dumps(facts, ensure_ascii=False, indent=1) + "\n")


def cast(network: Any, kind: torch.dtype) -> Any:
    """The network on the CPU in another precision, all of it: diffusers' own `to` warns of what it might leave out."""
    return nn.Module.to(network.eval(), "cpu", kind)


def pipeline_bytes(out: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in (*out.glob("*.safetensors"), *out.glob("*/*.safetensors")))


def write_card(out: Path, result: Mapping[str, Any], parts: Parts) -> None:
    """README.md: what the prior saw, how it was trained, and how it is used. One of the user's own stays."""
    run, names = result["run"], [str(name) for name in result["class_names"]]
    base = run["prior"]
    licence = licence_of(base) if base else NOT_STATED
    rows = {
        "kind": _kind(parts),
        "images": f"{parts.size} x {parts.size} pixels, {result['images']} of {placeless(run['data'])}",
        "classes": shown_names(names),
        "trained": f"{result['steps']} steps of {run['batch_size']} images, {result['seconds']:.0f} s on"
        f" {result['device']}",
        "settings": listed(
            {name: run[name] for name in ("optimiser", "lr", "schedule", "ema", "augment", "amp", "seed")}
        ),
        "parameters": f"{result['parameters'] / 1e6:.2f} million",
        "weights": f"{result['bytes'] / 1e6:.1f} MB in {run['weights']}",
        "loss": f"{result['validation_loss']:.4f} on images that it did not learn from",
    }
    if base:
        rows |= {"trained from": f"{placeless(base)}; licence: {licence}"}
        rows |= {"changed": _changed(run)}
    if judged := result["judged"]:
        told = "; ".join(f"{100 * share:.1f} % at --cfg {cfg}" for cfg, share in judged["right"].items())
        read = f"{judged['samples']} samples of {judged['steps']} steps"
        rows |= {f"{read} read right by {placeless(judged['by'])}": told}
    title = f"A diffusion prior of {len(names)} classes at {parts.size} pixels"
    stated = licence if re.fullmatch(r"[\w.-]+", licence) else "unknown"
    text = ["---", f"license: {stated}", "library_name: diffusers", "---", OURS, "", f"# {title}", ""]
    text += ["Trained with dfkd-train-prior.", "", *table(rows), "", "## How to use it", "", "```sh"]
    use = f"--prior {base} --lora FOLDER" if run["lora_rank"] else "--prior FOLDER"
    text += [f"dfkd-generate {use} --teacher-checkpoint TEACHER --out IMAGES", "```", ""]
    if facts := parts.conditions.facts():
        text += [f"Its prompt is `{facts['prompt']}`. ", ""]
    text += ["## Licence", "", f"Of these weights: {licence}. Of the images that it learned from: {NOT_STATED}."]
    write(out / CARD, "\n".join(text) + "\n")


def _kind(parts: Parts) -> str:
    shape = f"{parts.channels} x {parts.side} x {parts.side}"
    space = "pixels" if parts.vae is None else f"latents of {shape}"
    if isinstance(parts.vae, Patches):
        space = f"patches of {parts.vae.patch_size} x {parts.vae.patch_size} pixels, {shape}"
    told = {"class": "the class's number", "text": "a prompt", "none": "nothing"}[parts.conditions.kind]
    return f"{type(parts.denoiser).__name__} on {space}, told {told}; predicts {parts.denoising.prediction}"


def _changed(run: Mapping[str, Any]) -> str:
    if run["lora_rank"]:
        return f"low-rank changes of rank {run['lora_rank']} to its attention: {LORA_WEIGHTS}"
    return "UNet and text encoder" if run["train_text_encoder"] else "UNet"
