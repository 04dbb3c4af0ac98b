"""A prior and classifiers small enough to be differentiated in float64 by a loop written in a test."""

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.config import GenerateConfig
from dfkd.synthesis import pack as pack_module
from dfkd.synthesis.losses import GuidanceLoss
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd.teachers import Classifier

CLASS_NAMES = ("zero", "one", "two")
CHANNELS, SIDE, WIDTH = 2, 4, 5  # of the latents; of the text embeddings
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


class ProjectedBlock(nn.Module):
    """A residual block that defines its projection before its branch and calls it after, as many ResNets do."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Sequential(nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width))
        self.branch = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        return F.silu(out + self.projection(x))


def classifier(seed: int = 0, size: int = 8, dtype: torch.dtype = torch.float32, norm: bool = True) -> Classifier:
    """Smooth, with BatchNorm layers whose running statistics differ from what noise gives them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = (nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.SiLU())
        body = (ProjectedBlock(6, 7),) if norm else (nn.Conv2d(6, 7, 3), nn.SiLU())
        module = nn.Sequential(*first, *body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(28, len(CLASS_NAMES)))
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean = torch.randn(layer.num_features) / 3
                layer.running_var = torch.rand(layer.num_features) + 0.2
    module.eval().requires_grad_(False).to(dtype)
    return Classifier(module, CLASS_NAMES, (0.5, 0.4, 0.6), (0.2, 0.3, 0.25), size, "small")


class SmallPrior:
    """What a pipeline asks of a prior, with smooth networks. Counts the rows it denoises.

    coupling: how much of the output depends on z.
    """

    latent_channels, latent_size, vae_scale_factor, scaling_factor = CHANNELS, (SIDE, SIDE), 2, 1.0
    scheduler_config, source, device = SCHEDULER, "small", torch.device("cpu")
    prompt, labels, tokens, pixels, files = "a drawing of {label}", (), (), False, {}
    family = SimpleNamespace(
        name="small",
        part="unet",
        inputs=("context",),
        cfg="rows",
        texts=True,
        readers=(),
        multiple=1,
        largest=None,
        check=lambda _: None,
    )

    def __init__(self, seed: int = 1, dtype: torch.dtype = torch.float32, coupling: float = 1.0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.denoiser = nn.Sequential(nn.Conv2d(CHANNELS, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, CHANNELS, 1))
            self.text_encoder = nn.Linear(WIDTH, CHANNELS)
            self.vae = nn.Sequential(nn.Conv2d(CHANNELS, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 3, 3, padding=1))
        self.coupling = coupling
        self.digests = dict.fromkeys(("unet", "vae", "text_encoder", "tokenizer", "scheduler"), f"small {seed}")
        self.calls: list[tuple[int, Tensor]] = []  # rows and timestep of every call
        self.seen: list[Tensor] = []  # latents of every call
        self.cast(dtype)

    def cast(self, dtype: torch.dtype) -> "SmallPrior":
        self.dtype = dtype
        for network in (self.denoiser, self.text_encoder, self.vae):
            network.requires_grad_(False).to(dtype)
        return self

    def to(self, device: torch.device) -> "SmallPrior":
        self.device = device
        for network in (self.denoiser, self.text_encoder, self.vae):
            network.to(device)
        return self

    def doubled(self) -> "SmallPrior":
        return copy.deepcopy(self).cast(torch.float64)

    def denoise(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.calls.append((len(z), t))
        self.seen.append(z.detach())
        shift = torch.tanh(self.text_encoder(context.mean(1)) + t.to(self.dtype) / 1000)
        return self.coupling * self.denoiser(z) + shift[:, :, None, None]

    def decode(self, z0: Tensor) -> Tensor:
        return torch.sigmoid(4 * self.vae(F.interpolate(z0, scale_factor=2)))

    def encode(self, images: Tensor) -> Tensor:
        """Two channels of a quarter of the pixels."""
        return 2 * F.avg_pool2d(images, 2)[:, :CHANNELS] - 1

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"unet": self.denoiser, "vae": self.vae, "text_encoder": self.text_encoder}

    def conditions(self, prompts: Sequence[str], side: int = 0, cfg: float = 1.0) -> tuple[Tensor, ...]:
        return (torch.stack([self._encode(prompt) for prompt in prompts]),)

    def unconditional(self, prompt: str = "", side: int = 0) -> tuple[Tensor, ...]:
        return self.conditions([prompt])

    def _encode(self, prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(sum(i * ord(c) for i, c in enumerate(prompt, 1)))
        return torch.randn(3, WIDTH, generator=generator).to(self.device, self.dtype)


def bn_inputs(teacher: Classifier, images: Tensor) -> tuple[Tensor, list[tuple[Tensor, nn.BatchNorm2d]]]:
    """Logits, and what entered every BatchNorm layer, with the layer."""
    found: list[tuple[Tensor, nn.BatchNorm2d]] = []
    layers = [layer for layer in teacher.module.modules() if isinstance(layer, nn.BatchNorm2d)]
    handles = [layer.register_forward_hook(lambda layer, x, _: found.append((x[0], layer))) for layer in layers]
    logits = teacher.logits(images)
    for handle in handles:
        handle.remove()
    return logits, found


def plain_bn_loss(inputs: Sequence[tuple[Tensor, nn.BatchNorm2d]], kind: str) -> Tensor:
    """L_bn of all images together, a scalar, written from its definition."""
    total = torch.zeros((), dtype=inputs[0][0].dtype)
    for x, layer in inputs:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        if kind == "norm":
            total = total + torch.linalg.vector_norm(variance - layer.running_var)
            total = total + torch.linalg.vector_norm(mean - layer.running_mean)
        else:
            deviation = torch.sqrt(layer.running_var + layer.eps)
            off = ((mean - layer.running_mean) / deviation) ** 2
            off = off + (torch.sqrt(variance + layer.eps) / deviation - 1) ** 2
            total = total + off.mean() / len(inputs)
    return total


def plain_loss(
    prior: SmallPrior, teacher: Classifier, z0: Tensor, labels: Tensor, bn: float, cls: float, stats: str, kind: str
) -> Tensor:
    """The summed loss whose gradient guides: per-image terms, or a group's BN loss once for each of its images."""
    logits, inputs = bn_inputs(teacher, prior.decode(z0))
    total = cls * F.cross_entropy(logits, labels, reduction="sum")
    if stats == "group":
        return total + bn * len(z0) * plain_bn_loss(inputs, kind)
    images = [plain_bn_loss([(x[i : i + 1], layer) for x, layer in inputs], kind) for i in range(len(z0))]
    return total + bn * torch.stack(images).sum()


SETTINGS: dict[str, Any] = {"steps": 4, "cfg": 3.0, "prompt": "a {label}", "group": 7, "batch": 7}
SETTINGS |= {"bn_weight": 0.3, "cls_weight": 0.7, "device": "cpu", "backend": "eager", "kernels": "torch"}


def pipeline(
    prior: Any = None, teacher: Classifier | None = None, losses: Sequence[GuidanceLoss] = (), student: Any = None,
    **settings: Any,
) -> GuidedPipeline:  # fmt: skip
    """A pipeline of small networks; settings by flat name, beside SETTINGS."""
    config = GenerateConfig.of(**{**SETTINGS, **settings})
    return GuidedPipeline(prior or SmallPrior(), teacher or classifier(), config, student, losses)


def doubled(pipe: GuidedPipeline, monkeypatch: Any) -> GuidedPipeline:
    """The pipeline turned to float64, with the noise of float32."""
    draw = pack_module.philox_normal
    monkeypatch.setattr(pack_module, "philox_normal", lambda *key: draw(*key).double())
    pipe.prior.cast(torch.float64)
    pipe.teacher.module.double()
    return pipe
