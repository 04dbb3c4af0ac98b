"""Distillation of a tiny decoder from a prior's VAE, on latents that the prior itself draws: no image is read.

OUT/config.json and diffusion_pytorch_model.safetensors are what it leaves, an AutoencoderTiny whose encoder is absent.
OUT/pairs holds latents and images until the training is finished.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.config import DecoderTrainConfig, SamplingConfig
from dfkd.data import Form, Pool
from dfkd.files import replace_file, replace_text
from dfkd.runtime import generator, resolve_device, seed_global
from dfkd.synthesis.estimates import Trajectories
from dfkd.training.autoencoder import HALF
from dfkd.training.folder import finished, refuse_other, run_folder, write_result
from dfkd.training.loop import Progress, Say, Training, fit
from dfkd.training.losses import Network
from dfkd.training.state import State
from dfkd.training.step import autocast, check_training
from dfkd.training.world import World
from dfkd_engine.errors import EngineError
from dfkd_engine.priors.guidance_decoder import CONFIG, WEIGHTS
from dfkd_engine.priors.prior import Prior

PAIRS, RUN = "pairs", "run.json"
PART = 16  # trajectories of a file, and of a call at most
HELD_OUT = 16  # one trajectory of so many
ROWS = 16  # of a call that judges


class TinyDecoder(nn.Module):
    """Loss [] of an AutoencoderTiny's decoder: L1 of pixels and of neighbouring pixels' differences, in -1..1.

    forward(latents [B, C, h, w], images [B, 3, H, W] in -1..1).
    """

    def __init__(self, decoder: nn.Module, edge_weight: float) -> None:
        super().__init__()
        self.decoder, self.edge_weight = decoder, edge_weight

    def forward(self, latents: Tensor, images: Tensor) -> Tensor:
        made = self.decoder(latents.contiguous(memory_format=torch.channels_last)).float()
        edges = sum(F.l1_loss(made.diff(dim=d), images.diff(dim=d)) for d in (2, 3))
        loss: Tensor = F.l1_loss(made, images) + self.edge_weight * edges
        return loss


def train_decoder(
    prior: Prior,
    config: DecoderTrainConfig,
    out: Path | str,
    *,
    world: World | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
    on_new: Callable[[], object] | None = None,
) -> Path:
    """Train the decoder and return its folder.

    prior: a latent one. world, progress, say and on_new: as of dfkd.training.distill.distill. A run that was stopped
    goes on with the same result (bit for bit on a CPU); a finished one returns at once.

    Raises UsageError and EngineError: a prior of pixels, settings that do not fit it, what cannot work on the device,
    an `out` of other settings or in use; Stopped as of fit.
    """
    out, progress, say = Path(out), progress or (lambda done, total: None), say or (lambda text: None)
    world = world or World(resolve_device(config.train.compute.device))
    check_training(config.train, world)
    if prior.pixels:
        raise EngineError(f"prior {prior.source}", "it is of pixels, and has no decoder to distil", "use a latent one")
    prior.to(world.device)
    sampling = SamplingConfig(steps=config.sample_steps, cfg=config.cfg, prompt=config.prompt, size=config.size)
    trajectories = Trajectories(prior, sampling, config.classes)
    identity = {**config.identity(), "prior_digests": dict(prior.digests)}
    with run_folder(out, (CONFIG, WEIGHTS, PAIRS), config.train.resume, world, on_new):
        if world.from_first(lambda: finished(out, out / WEIGHTS, identity)):
            return out
        latents, images = draw_pairs(trajectories, config, out / PAIRS, identity, world, progress, say)
        decoder, state = _fit(prior, latents, images, config, out, identity, world, progress, say)
        if world.first:
            kind = torch.float16 if config.weights == "fp16" else torch.float32
            network: Any = state.result
            result = {
                "error": state.kept["error"],
                "steps": state.step,
                "seconds": round(state.seconds, 3),
                "pairs": len(images),
                "parameters": sum(p.numel() for p in network.parameters()),
                "device": str(world.device),
                "processes": world.size,
                "threads": torch.get_num_threads(),
                "out": str(out),
            }
            decoder.decoder = network.decoder
            save_decoder(decoder, out, kind)
            result["bytes"] = (out / WEIGHTS).stat().st_size
            write_result(out, identity, result)
            shutil.rmtree(out / PAIRS)
    return out


def make_decoder(prior: Prior, width: int, blocks: int) -> Any:
    """A new AutoencoderTiny of the latents as the denoiser takes them (scaling_factor 1); its encoder is idle."""
    from diffusers import AutoencoderTiny

    levels = prior.vae_scale_factor.bit_length()
    return AutoencoderTiny(
        latent_channels=prior.latent_channels,
        encoder_block_out_channels=(width,) * levels,
        decoder_block_out_channels=(width,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(*(blocks,) * (levels - 1), 1),
        scaling_factor=1.0,
    )


def save_decoder(network: Any, out: Path, kind: torch.dtype) -> None:
    """Write config and weights of the decoder alone, in diffusers' layout."""
    from safetensors.torch import save

    kept = {
        f"decoder.{name}": value.detach().cpu().to(kind).contiguous()
        for name, value in network.decoder.state_dict().items()
    }
    out.mkdir(parents=True, exist_ok=True)
    network.save_config(out)
    content = save(kept, metadata={"format": "pt"})
    replace_file(out / WEIGHTS, lambda file: file.write(content))


def draw_pairs(
    trajectories: Trajectories,
    config: DecoderTrainConfig,
    folder: Path,
    identity: Mapping[str, Any],
    world: World,
    progress: Progress,
    say: Say,
) -> tuple[Tensor, Tensor]:
    """Clean estimates [N, C, h, w] and the VAE's answers uint8 [N, 3, H, W], N = images x estimates, on the CPU.

    Files that are there are not drawn again; the processes share the rest out.
    """
    from safetensors.torch import load_file, save

    def begin() -> None:
        folder.mkdir(exist_ok=True)
        if (run := folder / RUN).exists():
            refuse_other(folder.parent, json.loads(run.read_text(encoding="utf-8")), identity)
        else:
            replace_text(run, json.dumps(dict(identity)) + "\n")

    world.from_first(begin)
    parts = [torch.arange(start, min(start + PART, config.images)) for start in range(0, config.images, PART)]
    say(f"pairs: {config.estimates} clean estimates of each of {config.images} trajectories, decoded by the VAE")
    prior, steps = trajectories.prior, len(trajectories.table)
    count = min(config.estimates, steps)
    for number, ids in enumerate(parts):
        file = folder / f"{number:05d}.safetensors"
        if number % world.size != world.rank or file.exists():
            continue
        kept = torch.stack([_steps(config.train.seed, int(i), steps, count) for i in ids])
        z0 = trajectories.estimates(ids, config.train.seed, kept).flatten(0, 1)
        with torch.no_grad():
            pixels = torch.cat(
                [(prior.decode(rows) * 255).round().to(torch.uint8).cpu() for rows in torch.split(z0, PART)]
            )
        content = save({"latents": z0.cpu().contiguous(), "images": pixels.contiguous()})
        replace_file(file, lambda opened, content=content: opened.write(content))  # type: ignore[misc]
        progress((number + 1) * PART, len(parts) * PART)
    world.from_first(lambda: None)  # all of them are written
    found = [load_file(folder / f"{number:05d}.safetensors") for number in range(len(parts))]
    return torch.cat([part["latents"] for part in found]), torch.cat([part["images"] for part in found])


def _steps(seed: int, image: int, steps: int, count: int) -> Tensor:
    """Steps of a trajectory, int64 [count], ascending and different: one at random in each of so many parts of it."""
    bounds = torch.arange(count + 1) * steps // count
    draw = torch.rand(count, generator=generator(seed, "estimates", image))
    return bounds[:-1] + (draw * (bounds[1:] - bounds[:-1])).long()


def _fit(
    prior: Prior,
    latents: Tensor,
    images: Tensor,
    config: DecoderTrainConfig,
    out: Path,
    identity: Mapping[str, Any],
    world: World,
    progress: Progress,
    say: Say,
) -> tuple[Any, State]:
    """Train; the AutoencoderTiny, and the state whose network has its decoder."""
    count = len(images)
    held = (torch.arange(count) // min(config.estimates, count)) % HELD_OUT == 0
    learned, kept_out = (~held).nonzero()[:, 0], held.nonzero()[:, 0]
    # An image's label is its number, by which the loss finds its latents.
    numbers = torch.arange(count)
    pool = Pool(images, numbers, numbers, tuple(map(str, range(count))), digest=json.dumps(identity, sort_keys=True))
    table = latents.to(world.device)
    with torch.random.fork_rng(devices=[]):
        seed_global(config.train.seed, torch.device("cpu"))
        decoder = make_decoder(prior, config.width, config.blocks)
    network = TinyDecoder(decoder.decoder, config.edge_weight).to(world.device)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    under_autocast = autocast(config.train.compute.amp, world.device)
    say(f"decoder: {sum(p.numel() for p in network.parameters()) / 1e6:.2f} million parameters, {len(learned)} pairs")

    def loss(called: Network, pixels: Tensor, labels: Tensor) -> Tensor:
        with under_autocast():
            return called(table[labels], pixels)

    @torch.no_grad()
    def evaluate(state: State) -> dict[str, float]:
        judged: Any = state.result.eval()
        total = 0.0
        for rows in torch.split(kept_out, ROWS):
            made = judged.decoder(table[rows.to(world.device)]).float().clamp(-1, 1)
            total += float((made - (images[rows].to(world.device).float() / 127.5 - 1)).abs().mean()) / 2 * len(rows)
        state.kept = {"error": total / len(kept_out)}
        return dict(state.kept)

    side = images.shape[-1]
    form = Form(side, HALF, HALF, world.device)
    example = (table[:2], torch.zeros(2, 3, side, side, device=world.device))
    training = Training(network, pool, learned, form, loss, evaluate, example=example)
    return decoder, fit(training, config.train, out, identity, world, progress, say)
