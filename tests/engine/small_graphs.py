"""The four kinds of network that engines are made of, small: UNet, decoder, its vector-Jacobian, guidance gradient.

They have each kind of layer once, since a compiler takes its time for every one: residual blocks, GroupNorm, attention
over pixels and over text, upsampling; in the teacher BatchNorm, max-pooling, a strided convolution.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from dfkd_engine.graph import Graph, trace
from dfkd_engine.spec import EngineSpec, TensorSpec

ROWS = (1, 4, 6)
SIDE, CHANNELS, WIDTH, TOKENS, CLASSES = 4, 4, 8, 5, 5

Z = TensorSpec("z", (None, CHANNELS, SIDE, SIDE), "float32")
IMAGE = TensorSpec("image_gradient", (None, 3, 2 * SIDE, 2 * SIDE), "float32")
INPUTS = {
    "unet": (Z, TensorSpec("t", (1,), "float32"), TensorSpec("context", (None, TOKENS, WIDTH), "float32")),
    "decode": (Z,),
    "decode_vjp": (Z, IMAGE),
    "gradient": (Z, TensorSpec("labels", (None,), "int64")),
}
GRADIENT = TensorSpec("gradient", Z.shape, "float32")
OUTPUTS = {
    "unet": (TensorSpec("prediction", Z.shape, "float32"),),
    "decode": (TensorSpec("image", IMAGE.shape, "float32"),),
    "decode_vjp": (GRADIENT,),
    "gradient": (GRADIENT, TensorSpec("cls", (None,), "float32")),
}
KINDS = {"unet": "forward", "decode": "forward", "decode_vjp": "gradient", "gradient": "gradient"}


class Decoder(nn.Module):
    """Latents [B, 4, h, w] -> images [B, 3, 2h, 2w], with the layers of AutoencoderKL's decoder."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, width, 3, padding=1)
        self.block = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.norm, self.qkv = nn.GroupNorm(4, width), nn.Linear(width, 3 * width)
        self.last = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        x = self.first(z)
        x = x + self.block(x)
        query, key, value = self.qkv(self.norm(x).flatten(2).transpose(1, 2)).chunk(3, 2)
        x = x + F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        return self.last(F.interpolate(x, scale_factor=2.0, mode="nearest"))


@dataclass(frozen=True)
class Networks:
    unet: UNet2DConditionModel
    decoder: nn.Module
    teacher: nn.Module
    dtype: torch.dtype = torch.float32

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Networks":
        return Networks(*(copy.deepcopy(n).to(device, dtype) for n in (self.unet, self.decoder, self.teacher)), dtype)

    def function(self, network: str) -> Callable[..., tuple[Tensor, ...]]:
        """What is traced, and, in float64, what an engine is judged by."""
        return {
            "unet": self._unet,
            "decode": self._decode,
            "decode_vjp": self._decode_vjp,
            "gradient": self._gradient,
        }[network]

    def _unet(self, z: Tensor, t: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        return (self.unet(z.to(self.dtype), t, context.to(self.dtype)).sample.to(z.dtype),)

    def _decode(self, z: Tensor) -> tuple[Tensor, ...]:
        return (self.decoder(z.to(self.dtype)).to(z.dtype),)

    def _decode_vjp(self, z: Tensor, image_gradient: Tensor) -> tuple[Tensor, ...]:
        leaf = z.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self._decode(leaf)[0], leaf, image_gradient)

    def _gradient(self, z: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        leaf = z.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.teacher(self._decode(leaf)[0].to(self.dtype)).to(z.dtype)
            loss = F.cross_entropy(logits, labels, reduction="none")
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return gradient, loss.detach()


@cache
def networks() -> Networks:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=(8,), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
            cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=4, sample_size=SIDE,
        )  # fmt: skip
        decoder = Decoder()
        teacher = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
        )  # fmt: skip
        for layer in teacher:
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 1.5)
        for network in (unet, decoder, teacher):
            network.eval().requires_grad_(False)
        return Networks(unet, decoder, teacher)


@cache
def graph(network: str) -> Graph:
    names = [output.name for output in OUTPUTS[network]]
    return trace(networks().function(network), INPUTS[network], output_names=names)


def spec(network: str, backend: str, device: str = "cpu", dtype: str = "float32") -> EngineSpec:
    return EngineSpec(
        network=network,
        config={},
        components={},
        inputs=INPUTS[network],
        outputs=OUTPUTS[network],
        rows=ROWS,
        dtype=dtype,
        backend=backend,
        versions={},
        device=device,
        flags={},
        sources="test",
    )


def arguments(network: str, rows: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for tensor in INPUTS[network]:
        if tensor.dtype == "int64":
            made.append(torch.arange(rows) % CLASSES)
        elif tensor.name == "t":
            made.append(torch.tensor([500.0]))
        else:
            made.append(torch.randn(tensor.sizes(rows), generator=generator))
    return tuple(made)
