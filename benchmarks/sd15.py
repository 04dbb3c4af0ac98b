"""Stable Diffusion 1.5 at its published sizes and a ResNet-34, with random weights: for what does not depend on values.

Nothing is downloaded. Weights are normal with the variance that keeps a layer's output as large as its input, so that
half precision holds the activations.
"""

import math
import tempfile
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import ResNetConfig

from dfkd.config import NORMALISATIONS
from dfkd.cli.prepare import FP16_LOSS_SCALE, on_device
from dfkd.compiled.functions import Sources
from dfkd.synthesis.guidance import LossWeights
from dfkd.teachers.adapters import build
from dfkd.teachers.classifier import Classifier
from dfkd_engine.attention import set_attention
from dfkd_engine.networks import Prior

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


def make_sources(size: int, thin: bool = False, seed: int = 0) -> Sources:
    """The networks in float16 on the CPU, the teacher in float32 as in a run. size: of images, a multiple of 8."""
    widths = THIN if thin else {}
    unet = random(lambda: UNet2DConditionModel(**UNET | widths.get("unet", {})), torch.float16, seed)
    vae = random(lambda: AutoencoderKL(**VAE | widths.get("vae", {})), torch.float16, seed + 1)
    for network in (unet, vae):
        network.to(memory_format=torch.channels_last)
        set_attention(network, "sdpa")
    factor = 2 ** (len(VAE["block_out_channels"]) - 1)
    latent_size = (size // factor, size // factor)
    width = int(unet.config.cross_attention_dim)
    prior = Prior(
        unet=unet,
        vae=vae,
        text_encoder=None,
        tokenizer=None,  # type: ignore[arg-type]  # no prompts but these are asked for
        scheduler_config={},
        prediction_type="epsilon",
        latent_channels=UNET["in_channels"],
        latent_size=latent_size,
        vae_scale_factor=factor,
        scaling_factor=VAE["scaling_factor"],
        source="random weights in the sizes of Stable Diffusion 1.5",
        weights_digest="",
        _encoded={text: torch.zeros(TOKENS, width, dtype=torch.float16) for text in ("", "a photo")},
    )
    return Sources(
        prior, teacher(widths.get("teacher", {}), seed + 2), LossWeights(1.0, 1.0), latent_size, FP16_LOSS_SCALE
    )


def placed(sources: Sources, device: torch.device, dtype: torch.dtype) -> Sources:
    """The same networks there, UNet and decoder in `dtype`, with the loss scale that it wants."""
    prior, classifier = sources.prior, sources.teacher
    assert classifier is not None
    for network in (prior.unet, prior.vae):
        network.to(device, dtype, memory_format=torch.channels_last)
    encoded = {text: embedding.to(device, dtype) for text, embedding in prior._encoded.items()}
    scale = FP16_LOSS_SCALE if dtype == torch.float16 else 1.0
    own = replace(prior, _encoded=encoded)
    return replace(sources, prior=own, teacher=on_device(classifier, device), loss_scale=scale)


def teacher(widths: dict[str, Any], seed: int) -> Classifier:
    with tempfile.TemporaryDirectory() as folder:
        ResNetConfig(**RESNET34 | widths).save_pretrained(folder)
        module = random(lambda: build(f"transformers:{folder}", CLASSES), torch.float32, seed)
    names = tuple(str(index) for index in range(CLASSES))
    return on_device(Classifier(module, "resnet34", names, 224, *NORMALISATIONS["imagenet"]), torch.device("cpu"))


def random(make: Any, dtype: torch.dtype, seed: int) -> Any:
    """A network whose weights are drawn once, in `dtype`: made without memory, then filled. Evaluation mode, frozen."""
    with torch.device("meta"):
        network = make()
    network = nn.Module.to(network, dtype).to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            fill(module, name, weight, generator)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.zero_()
            module.running_var.fill_(1)
            module.num_batches_tracked.zero_()
    return network


def fill(module: nn.Module, name: str, weight: Tensor, generator: torch.Generator) -> None:
    """Norms do nothing; other weights have the variance 1 / fan-in, biases a hundredth."""
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)):
        weight.fill_(1.0 if name == "weight" else 0.0)
    else:
        weight.normal_(0.0, 0.01 if weight.dim() == 1 else 1 / math.sqrt(weight[0].numel()), generator=generator)
