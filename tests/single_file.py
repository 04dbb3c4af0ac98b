"""A Stable Diffusion pipeline's weights under the names that they had in one file, before diffusers."""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
_RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
_UNET = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
_UNET |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
_VAE = {r"down_blocks\.(\d+)\.resnets": r"down.\1.block", r"down_blocks\.(\d+)\.downsamplers\.0": r"down.\1.downsample"}
_VAE |= {r"mid_block\.resnets\.0": "mid.block_1", r"mid_block\.resnets\.1": "mid.block_2", "conv_norm_out": "norm_out"}
_VAE |= {"conv_shortcut": "nin_shortcut", r"mid_block\.attentions\.0": "mid.attn_1", "group_norm": "norm"}
_VAE |= {"to_q": "q", "to_k": "k", "to_v": "v", r"to_out\.0": "proj_out"}
_OPEN_CLIP = {"embeddings.position_embedding.weight": "positional_embedding", "final_layer_norm": "ln_final"}
_OPEN_CLIP |= {"embeddings.token_embedding": "token_embedding", "encoder.layers": "transformer.resblocks"}
_OPEN_CLIP |= {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj", "self_attn": "attn"}


def write_single_file(pipeline: StableDiffusionPipeline, file: Path, open_clip: bool = False) -> Path:
    """Write a pipeline's weights as one file. open_clip: the text encoder as Stable Diffusion 2 has it."""
    weights = {f"model.diffusion_model.{name}": w for name, w in _unet(pipeline.unet).items()}
    weights |= {f"first_stage_model.{name}": w for name, w in _vae(pipeline.vae).items()}
    text = pipeline.text_encoder.state_dict()
    text = {name.removeprefix("text_model."): w for name, w in text.items() if not name.endswith("position_ids")}
    if open_clip:
        weights |= {f"cond_stage_model.model.{name}": w for name, w in _open_clip(text).items()}
    else:
        weights |= {f"cond_stage_model.transformer.text_model.{name}": w for name, w in text.items()}
        weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file({name: w.contiguous() for name, w in weights.items()}, file)
    return file


def _unet(unet: Any) -> dict[str, Tensor]:
    per_level = unet.config.layers_per_block + 1

    def renamed(name: str) -> str:
        for own, old in _UNET.items():
            if name.startswith(own + "."):
                return name.replace(own, old)
        part, block, kind, i, rest = re.fullmatch(  # type: ignore[union-attr]
            r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name
        ).groups()
        if kind == "resnets":
            for own, old in _RESNET.items():
                rest = re.sub(rf"^{own}\.", f"{old}.", rest)
        if part == "mid":
            return f"middle_block.{1 if kind == 'attentions' else 2 * int(i)}.{rest}"
        first = int(block) * per_level + (part == "down")
        blocks = "input_blocks" if part == "down" else "output_blocks"
        if kind == "downsamplers":
            return f"{blocks}.{first + per_level - 1}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            attended = "CrossAttn" in unet.config.up_block_types[int(block)]
            return f"{blocks}.{first + per_level - 1}.{2 if attended else 1}.{rest}"
        return f"{blocks}.{first + int(i)}.{1 if kind == 'attentions' else 0}.{rest}"

    return {renamed(name): w for name, w in unet.state_dict().items()}


def _vae(vae: Any) -> dict[str, Tensor]:
    levels, found = len(vae.config.block_out_channels), {}
    for name, weight in vae.state_dict().items():
        old = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        old = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", old)
        for own, new in _VAE.items():
            old = re.sub(rf"(?<=\.){own}(?=\.)", new, old)
        linear = "attn_1" in old and weight.ndim == 2
        found[old] = weight[..., None, None] if linear else weight
    return found


def _open_clip(text: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {"text_projection": torch.eye(len(text["final_layer_norm.weight"]))}
    for name, weight in text.items():
        old = name
        for own, new in _OPEN_CLIP.items():
            old = old.replace(own, new)
        if match := re.fullmatch(r"(.*\.attn\.)q_proj\.(weight|bias)", old):
            three = [text[name.replace("q_proj", kind)] for kind in ("q_proj", "k_proj", "v_proj")]
            found[f"{match[1]}in_proj_{match[2]}"] = torch.cat(three)
        elif not re.search(r"\.[kv]_proj\.", old):
            found[old] = weight
    return found
