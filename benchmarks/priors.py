"""Families of priors, and what an image of a published model of each costs, by its arithmetic alone.

    python -m benchmarks.priors --record       a minute; no weights, no GPU: networks are made without memory

FLOP as of benchmarks/flops.py. At every step an image takes one row of the denoiser (two where classifier-free guidance
has a row of its own) and one gradient through decoder and teacher, a ResNet-34 at 224x224; and one decoding at the end.
Steps and rows are those of the model's own card.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from benchmarks import sd15
from benchmarks.flops import counted
from benchmarks.machine import describe
from benchmarks.recording import finish, scaled, table
from dfkd_engine.priors.families import FAMILIES
from dfkd_engine.priors.families.dit import DiT
from dfkd_engine.priors.families.family import Family
from dfkd_engine.priors.families.stable_diffusion import StableDiffusion
from dfkd_engine.priors.families.stable_diffusion_3 import StableDiffusion3
from dfkd_engine.priors.families.stable_diffusion_xl import StableDiffusionXL
from dfkd_engine.priors.families.unet2d import PixelUNet

NAME = "priors"
COMMAND = f"python -m benchmarks.{NAME} --record"
TEACHER_SIDE = 224


@dataclass(frozen=True)
class Published:
    """A model by the sizes in its configs.

    model: its id on the hub. denoiser, vae: configs; {} for a model of pixels. conditions: shapes of one row; int64 of
    a class id is (). side: of its latents. steps, rows: of an image, rows of the denoiser a step.
    """

    model: str
    family: type[Family]
    denoiser: Mapping[str, Any]
    vae: Mapping[str, Any]
    conditions: Sequence[tuple[int, ...]]
    side: int
    steps: int
    rows: int


SD2 = sd15.UNET | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
SDXL: dict[str, Any] = sd15.UNET | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
}
SD3: dict[str, Any] = {
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
DIT: dict[str, Any] = {"attention_head_dim": 72, "num_attention_heads": 16, "num_layers": 28, "out_channels": 8}
DDPM: dict[str, Any] = {
    "attention_head_dim": None,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "sample_size": 32,
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
VAE16 = sd15.VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
MODELS = (
    Published("stable-diffusion-v1-5", StableDiffusion, sd15.UNET, sd15.VAE, [(77, 768)], 64, 50, 2),
    Published("stable-diffusion-2-1", StableDiffusion, SD2, sd15.VAE, [(77, 1024)], 96, 50, 2),
    Published("sd-turbo", StableDiffusion, SD2, sd15.VAE, [(77, 1024)], 64, 1, 1),
    Published(
        "LCM_Dreamshaper_v7",
        StableDiffusion,
        sd15.UNET | {"time_cond_proj_dim": 256},
        sd15.VAE,
        [(77, 768), (256,)],
        96,
        4,
        1,
    ),
    Published(
        "stable-diffusion-xl-base-1.0", StableDiffusionXL, SDXL, sd15.VAE, [(77, 2048), (1280,), (6,)], 128, 50, 2
    ),
    Published("sdxl-turbo", StableDiffusionXL, SDXL, sd15.VAE, [(77, 2048), (1280,), (6,)], 64, 1, 1),
    Published("stable-diffusion-3-medium", StableDiffusion3, SD3, VAE16, [(77 + 256, 4096), (2048,)], 128, 28, 2),
    Published("DiT-XL-2-256", DiT, DIT, sd15.VAE, [()], 32, 250, 2),
    Published("ddpm-cifar10-32", PixelUNet, DDPM, {}, [], 32, 1000, 1),
)


def measure(of: Published, teacher: nn.Module) -> dict[str, Any]:
    """A row of the table: parameters, and FLOP of each part and of a guided image."""
    with torch.device("meta"):
        denoiser = getattr(diffusers, of.family.denoiser)(**of.denoiser).eval().requires_grad_(False)
        vae = diffusers.AutoencoderKL(**of.vae).eval().requires_grad_(False) if of.vae else None
        z = torch.zeros(1, denoiser.config.in_channels, of.side, of.side)
        given = [torch.zeros(1, *shape) if shape else torch.zeros(1, dtype=torch.int64) for shape in of.conditions]
        own = of.family.__new__(of.family)  # without its text encoders: a prediction needs none
        output, row = counted(lambda z: own.predict(denoiser, z, torch.tensor([1.0]), *given), z)

        def decode(z: Tensor) -> Tensor:
            return z if vae is None else vae.decode(z).sample

        image, decoding = counted(decode, z)
        _, through_decoder = counted(_gradient(decode), z)
        seen = torch.zeros(1, 3, TEACHER_SIDE, TEACHER_SIDE)
        _, through_teacher = counted(_gradient(teacher), seen)
    assert output.shape == z.shape
    gradient = through_decoder + through_teacher
    return {
        "model": of.model,
        "family": of.family.name,
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "side": image.shape[-1],
        "steps": of.steps,
        "rows": of.rows,
        "denoiser_flop": row,
        "gradient_flop": gradient,
        "decode_flop": decoding,
        "image_flop": of.steps * (of.rows * row + gradient) + decoding,
    }


def _gradient(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The gradient of the sum of call(x) in x, forward pass included."""

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(call(leaf * 1).sum(), leaf)  # the counter's hooks take no leaf
        return found

    return gradient


def markdown(result: Mapping[str, Any]) -> str:
    heads = ("model", "its kind", "parameters", "image", "steps x rows", "a row", "a gradient", "a guided image")
    lines = table(heads, (
        (
            row["model"], row["family"], scaled(row["parameters"]), f"{row['side']}x{row['side']}",
            f"{row['steps']} x {row['rows']}", scaled(row["denoiser_flop"], "FLOP"),
            scaled(row["gradient_flop"], "FLOP"), scaled(row["image_flop"], "FLOP"),
        )
        for row in result["rows"]
    ))  # fmt: skip
    return "\n".join([*lines, "", f"torch {result['machine']['versions']['torch']}: `{COMMAND}`."])


def kinds(_: Mapping[str, Any]) -> str:
    """The table of families, from the code that loads them."""
    heads = ("kind", "denoiser", "decoder", "prompt")
    prompts = {of.denoiser: "text" if of.texts else "a class's name" for of in FAMILIES}
    prompts["UNet2DModel"] += ", or nothing"  # without class embeddings
    return "\n".join(
        table(
            heads,
            ((of.name, of.denoiser, " or ".join(of.vaes) or "none: pixels", prompts[of.denoiser]) for of in FAMILIES),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write benchmarks/results/{NAME}-cpu.json")
    a = parser.parse_args()
    teacher = sd15.make_teacher().module.to("meta")
    rows = [measure(of, teacher) for of in MODELS]
    result = {"machine": describe(torch.device("cpu")), "rows": rows}
    finish(result, markdown(result), NAME if a.record else "")


if __name__ == "__main__":
    main()
