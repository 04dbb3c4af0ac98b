"""Stable Diffusion 1.5 at its published sizes and a ResNet-34, with random weights: for what does not depend on values.

Nothing is downloaded. Weights are normal with the variance that keeps a layer's output as large as its input, so that
half precision holds the activations. Prompts go through the demo's tokenizer and one layer of CLIP as wide as the
UNet's cross-attention, which are not what is timed.
"""

import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, ResNetConfig

import dfkd.priors  # noqa: F401  (makes the embedded prior known by its name)
from dfkd.config import NORMALISATIONS
from dfkd.teachers import Classifier
from dfkd.teachers.adapters import build
from dfkd_engine.priors.families.stable_diffusion import StableDiffusion, last_hidden_state
from dfkd_engine.priors.families.text import TextEncoder
from dfkd_engine.priors.prior import DTYPES, EMBEDDED, Prior

UNET: dict[str, Any] = {  # unet/config.json
    "act_fn": "silu",
    "attention_head_dim": 8,  # the number of heads, in spite of its name
    "block_out_channels": (320, 640, 1280, 1280),
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
VAE: dict[str, Any] = {  # vae/config.json
    "act_fn": "silu",
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SCHEDULER: dict[str, Any] = {  # scheduler/scheduler_config.json
    "_class_name": "DDPMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "steps_offset": 1,
}
TOKENS = 77  # of CLIP ViT-L/14, whose width is the UNet's cross_attention_dim
RESNET34: dict[str, Any] = {  # torchvision's resnet34, at 224x224, as transformers writes it
    "depths": (3, 4, 6, 3),
    "embedding_size": 64,
    "hidden_sizes": (64, 128, 256, 512),
    "layer_type": "basic",
}
CLASSES = 1000

THIN = {  # the same layers with a thousandth of the arithmetic
    "unet": {"block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32},
    "vae": {"block_out_channels": (32, 32, 64, 64)},
    "teacher": {"embedding_size": 8, "hidden_sizes": (8, 8, 16, 16)},
}


def make_prior(size: int, dtype: str = "fp16", thin: bool = False, seed: int = 0) -> Prior:
    """A prior on the CPU, NHWC as one that is loaded. size: of images, a multiple of 8. dtype: a key of DTYPES."""
    widths, kind = THIN if thin else {}, DTYPES[dtype]
    unet = random(lambda: UNet2DConditionModel(**UNET | widths.get("unet", {})), kind, seed)
    vae = random(lambda: AutoencoderKL(**VAE | widths.get("vae", {})), kind, seed + 1)
    for network in (unet, vae):
        network.to(memory_format=torch.channels_last)
    factor, width = 2 ** (len(VAE["block_out_channels"]) - 1), int(unet.config.cross_attention_dim)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED["demo"] / "tokenizer", model_max_length=TOKENS)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": width, "hidden_size": width}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **ends, **shape))
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    return Prior(
        denoiser=unet,
        vae=vae,
        family=StableDiffusion(unet.config, TextEncoder(text.to(kind), tokenizer, last_hidden_state)),
        scheduler_config=SCHEDULER,
        prediction_type="epsilon",
        latent_channels=UNET["in_channels"],
        latent_size=(size // factor, size // factor),
        vae_scale_factor=factor,
        scaling_factor=VAE["scaling_factor"],
        shift_factor=0.0,
        prompt=StableDiffusion.prompt,
        source="random weights in the sizes of Stable Diffusion 1.5",
        digests=dict.fromkeys(parts, f"random {seed} {size} {dtype} {thin}"),
    )


def make_teacher(thin: bool = False, seed: int = 2) -> Classifier:
    """A ResNet-34 of 1000 classes, in float32 on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        ResNetConfig(**RESNET34 | (THIN["teacher"] if thin else {})).save_pretrained(folder)
        module = random(lambda: build(f"transformers:{folder}", CLASSES), torch.float32, seed)
    names = tuple(map(str, range(CLASSES)))
    return Classifier(module, names, *NORMALISATIONS["imagenet"], 224, "resnet34", "published")


def random(make: Callable[[], nn.Module], dtype: torch.dtype, seed: int) -> Any:
    """A network whose weights are drawn once, in `dtype`: made without memory, then filled. Evaluation mode, frozen."""
    with torch.device("meta"):
        network = make()
    network = nn.Module.to(network, dtype).to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            _fill(module, name, weight, generator)
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return network


def _fill(module: nn.Module, name: str, weight: Tensor, generator: torch.Generator) -> None:
    """Norms do nothing; other weights have the variance 1 / fan-in, biases a hundredth."""
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)):
        weight.fill_(1.0 if name == "weight" else 0.0)
    else:
        weight.normal_(0.0, 0.01 if weight.dim() == 1 else 1 / math.sqrt(weight[0].numel()), generator=generator)
