"""The autoencoder of a latent prior: trained before the denoiser, in a stage of its own that can be resumed.

OUT/autoencoder/vae              its weights and config, in the precision of the finished prior
OUT/autoencoder/log.jsonl, ...   as of every training
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.config import PriorTrainConfig, TrainConfig
from dfkd.data import Form, Images
from dfkd.errors import UsageError
from dfkd.runtime import seed_global
from dfkd.training.folder import finished, run_folder, write_result
from dfkd.training.loop import Progress, Say, Training, fit
from dfkd.training.losses import Network
from dfkd.training.prior_networks import make_autoencoder
from dfkd.training.state import State
from dfkd.training.step import autocast
from dfkd.training.world import World
from dfkd_engine.priors.opening import open_prior

STAGE, VAE = "autoencoder", "vae"
KINDS = ("AutoencoderKL", "AutoencoderTiny")
MOST = 2000  # images that the spread of the latents is taken from
ROWS = 100
HALF = (0.5, 0.5, 0.5)


class Autoencoding(nn.Module):
    """Loss [] of images [B, 3, H, W] in -1..1: L1 of pixels, of neighbouring pixels' differences, and a small KL."""

    def __init__(self, vae: nn.Module, edge_weight: float, kl_weight: float) -> None:
        super().__init__()
        self.vae, self.edge_weight, self.kl_weight = vae, edge_weight, kl_weight

    def forward(self, images: Tensor) -> Tensor:
        posterior = self.vae.encode(images).latent_dist  # type: ignore[operator]
        made = self.vae.decode(posterior.sample()).sample.float()  # type: ignore[operator]
        edges = sum(F.l1_loss(made.diff(dim=d), images.diff(dim=d)) for d in (2, 3))
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss: Tensor = F.l1_loss(made, images) + self.edge_weight * edges + self.kl_weight * kl
        return loss


def train_autoencoder(
    images: Images,
    learning: Images,
    config: PriorTrainConfig,
    size: int,
    out: Path,
    identity: Mapping[str, Any],
    world: World,
    progress: Progress,
    say: Say,
) -> Any:
    """A new AutoencoderKL on the device, frozen, rounded as it was saved; one that is finished is loaded.

    images: what it learns from. learning: the denoiser's images, whose latents its scaling_factor makes of deviation 1.
    identity: of the whole run. Raises as dfkd.training.loop.fit.
    """
    from diffusers import AutoencoderKL

    own, stage, folder = config.autoencoder, out / STAGE, out / STAGE / VAE
    train = stage_config(config)
    with run_folder(stage, (VAE,), config.train.resume, world):
        if not world.from_first(lambda: finished(stage, folder / "config.json", identity)):
            with torch.random.fork_rng(devices=[]):
                seed_global(config.train.seed, torch.device("cpu"))
                vae = make_autoencoder(own, config.denoiser.norm_groups, size)
            network = Autoencoding(vae, own.edge_weight, own.kl_weight).to(world.device)
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            say(f"autoencoder on {len(images.labels)} images: {own.steps} steps")
            under_autocast = autocast(train.compute.amp, world.device)

            def loss(called: Network, pixels: Tensor, labels: Tensor) -> Tensor:
                with under_autocast():
                    return called(pixels)

            def evaluate(state: State) -> dict[str, float]:
                return {}

            form = Form(size, HALF, HALF, world.device)
            training = Training(network, images, torch.arange(len(images.labels)), form, loss, evaluate)
            state = fit(training, train, stage, identity, world, progress, say)

            def save() -> None:
                kind = torch.float16 if config.weights == "fp16" else torch.float32
                vae.eval().to(kind).float()
                vae.register_to_config(scaling_factor=round(1 / spread(vae, learning, world.device), 5))
                vae.to(kind).save_pretrained(folder)
                write_result(stage, identity, {"steps": state.step, "seconds": round(state.seconds, 3)})

            world.from_first(save)
    found = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    return found.to(world.device).eval().requires_grad_(False).to(memory_format=torch.channels_last)


def open_autoencoder(source: str, device: torch.device) -> Any:
    """The frozen VAE of a pipeline that exists, on the device. Raises EngineError and UsageError where it has none."""
    import diffusers

    folder = open_prior(source)
    folder.require("vae")
    kind = folder.configs["vae"].get("_class_name")
    if kind not in KINDS:
        raise UsageError(f"--vae {source} is a {kind}", f"want one of {', '.join(KINDS)}", "choose another")
    vae = folder.load(getattr(diffusers, kind), VAE, torch_dtype=torch.float32)
    return vae.to(device).eval().requires_grad_(False).to(memory_format=torch.channels_last)


def stage_config(config: PriorTrainConfig) -> TrainConfig:
    """The settings of the autoencoder's training; where and how it computes are the denoiser's."""
    own = config.autoencoder
    return config.train.replace(
        steps=own.steps,
        batch_size=own.batch_size,
        lr=own.lr,
        optimiser="adamw",
        momentum=0.9,
        beta2=0.99,
        weight_decay=1e-4,
        decay="all",
        schedule="cosine",
        warmup=min(100, own.steps // 10),
        clip_norm=1.0,
        ema=0.0,
        augment="none",
        checkpoint_every=None,
    )


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> Tensor:
    """Latents [B, C, h, w], scaled as a denoiser takes them, of images in -1..1: the mean of the encoder's answer."""
    answer = vae.encode(images.to(vae.dtype))
    latents: Tensor = answer.latent_dist.mean if hasattr(answer, "latent_dist") else answer.latents
    return (latents.float() - float(vae.config.get("shift_factor") or 0.0)) * float(vae.config.scaling_factor)


@torch.no_grad()
def decode(vae: Any, z0: Tensor) -> Tensor:
    """Images in -1..1 of clean latents; vae None: they are pixels already."""
    if vae is None:
        return z0.clamp(-1, 1)
    latents = z0 / float(vae.config.scaling_factor) + float(vae.config.get("shift_factor") or 0.0)
    images: Tensor = vae.decode(latents.to(vae.dtype)).sample
    return images.float().clamp(-1, 1)


def spread(vae: Any, images: Images, device: torch.device) -> float:
    """Standard deviation of the latents, unscaled, of images spread evenly over all."""
    count = min(MOST, len(images.labels))
    found = []
    for positions in torch.split(torch.arange(count) * len(images.labels) // count, ROWS):
        pixels = images.read(positions).to(device).float() / 127.5 - 1
        with torch.no_grad():
            found.append(vae.encode(pixels).latent_dist.mean.cpu())
    return float(torch.cat(found).std())
