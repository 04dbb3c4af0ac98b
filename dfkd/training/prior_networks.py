"""The networks of a prior that is trained from nothing: UNet, autoencoder, text encoder, and its noise schedule.

Shapes follow DenoiserConfig and AutoencoderConfig; classes are diffusers' and transformers', so that what is saved
needs nothing of this project.
"""

from typing import Any

from torch import nn

from dfkd.config import AutoencoderConfig, DenoiserConfig
from dfkd.errors import UsageError

LEAST_TIME = 128  # width of the time embedding; diffusers' own, four times the first level's, is little for thin ones
PIXEL_DEVIATION = 0.5  # of images in -1..1
PATCH = 2  # side of a patch of pixels
FLOW_TIMES = 1000  # of a flow's t in 0..1 as the denoiser takes it


def check_sizes(config: DenoiserConfig, size: int, factor: int) -> int:
    """The side of what is denoised. size: of the images; factor: of the autoencoder, else 1. Raises UsageError."""
    deepest = factor * 2 ** (len(config.widths) - 1)
    if size % deepest:
        parts = f"{len(config.widths)} --widths halve the side {len(config.widths) - 1} times"
        parts += f", after an autoencoder or patches that divide it by {factor}" if factor > 1 else ""
        near = max(deepest, round(size / deepest) * deepest)
        raise UsageError(f"--size {size}", f"{parts}, and {size} is not a multiple of {deepest}", f"use {near}")
    return size // factor


def factor_of(config: DenoiserConfig, autoencoder: AutoencoderConfig) -> int:
    """Image side over the side of what is denoised, by an autoencoder that is trained here, or without one."""
    if config.space == "latent":
        return int(2 ** (len(autoencoder.widths) - 1))
    return PATCH if config.space == "patch" else 1


def make_denoiser(config: DenoiserConfig, channels: int, side: int, classes: int = 0) -> nn.Module:
    """A UNet2DConditionModel for condition text, else a UNet2DModel.

    channels, side: of what it denoises. classes: K; their embedding has K + 1 rows, the last one for no class.
    """
    from diffusers import UNet2DConditionModel, UNet2DModel

    sides = [side // 2**level for level in range(len(config.widths))]
    attends = [level <= config.attention_at for level in sides]
    shape: dict[str, Any] = {
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": config.widths,
        "layers_per_block": config.blocks,
        "norm_num_groups": config.norm_groups,
        "time_embedding_dim": max(4 * config.widths[0], LEAST_TIME),
    }
    if config.condition == "text":
        kinds = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
        # This class takes the number of heads under that name (diffusers issue 2011).
        heads = tuple(width // config.head_width for width in config.widths)
        shape |= {"cross_attention_dim": config.text_width, "attention_head_dim": heads}
    else:
        kinds = ("AttnDownBlock2D", "DownBlock2D", "AttnUpBlock2D", "UpBlock2D")
        shape |= {"attention_head_dim": config.head_width, "resnet_time_scale_shift": "scale_shift"}
        shape |= {"add_attention": config.attention_at > 0}
        shape |= {"num_class_embeds": classes + 1} if config.condition == "class" else {}
    down = tuple(kinds[0] if attention else kinds[1] for attention in attends)
    up = tuple(kinds[2] if attention else kinds[3] for attention in reversed(attends))
    network = UNet2DConditionModel if config.condition == "text" else UNet2DModel
    made: nn.Module = network(down_block_types=down, up_block_types=up, **shape)
    return made


def make_autoencoder(config: AutoencoderConfig, groups: int, size: int) -> Any:
    """An AutoencoderKL; groups: of its norms, size: of the images."""
    from diffusers import AutoencoderKL

    levels = len(config.widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.widths,
        layers_per_block=config.blocks,
        latent_channels=config.channels,
        norm_num_groups=groups,
        sample_size=size,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_text_encoder(config: DenoiserConfig, tokenizer: Any) -> Any:
    """A CLIPTextModel for the tokenizer's words and length."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=2 * config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_width // config.head_width,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler(config: DenoiserConfig) -> Any:
    """The noise schedule: flow matching, or DDIM's with Stable Diffusion's noise for latents and DDPM's for pixels."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if config.predict == "flow":
        # (1 - t) z0 + t n with z0 of deviation s is as noisy as with unit deviation where the odds t / (1 - t) are s
        # times as large: diffusers' shift, in training and sampling alike.
        shift = PIXEL_DEVIATION if config.space == "pixel" else 1.0
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=FLOW_TIMES, shift=shift)
    latent = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(
        **(latent if config.space == "latent" else {}),
        prediction_type="v_prediction" if config.predict == "v" else "epsilon",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )
