"""Guidance through a tiny decoder beside guidance through the VAE: error of its images, cosine of gradients, seconds.

    python -m benchmarks.bench_guidance_decoder --teacher runs/demo/teacher

demo                          the embedded prior, and tiny decoders of several widths, trained here on what it draws
Stable Diffusion 1.5, thin    its layers with a thousandth of the arithmetic and random weights, a tiny decoder trained
                              on them: a random VAE is no picture's, and says how far the training follows any
Stable Diffusion 1.5          its published sizes and TAESD's (width 64, 3 blocks), random weights: seconds alone

image error      mean absolute difference from the VAE's image, of 255, over clean estimates of other trajectories than
                 those of the training
gradient cosine  between the gradients in the latent of the demo's losses, a mean over images; without --teacher the
                 teacher has random weights, as those of Stable Diffusion always have
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks import demo, driver, sd15
from benchmarks.driver import Group, Work
from dfkd.config import DecoderTrainConfig, SamplingConfig
from dfkd.synthesis.estimates import Trajectories
from dfkd.synthesis.guidance import Decode, Guidance
from dfkd.synthesis.losses import losses_of
from dfkd.teachers import Classifier
from dfkd.training.decoder import make_decoder, save_decoder, train_decoder
from dfkd_engine.priors.guidance_decoder import Decoder
from dfkd_engine.priors.prior import Prior

VAE = "through the VAE"
WIDTHS = (8, 16, 32)  # of the demo's, with one block a level
TAESD = (64, 3)
IMAGES = {"cpu": 16, "cuda": 64}  # of the demo
THIN_SIDE, SIDES = 64, {"cpu": 64, "cuda": 512}  # of images of Stable Diffusion's kinds
SEED = 12345  # a seed that is no training's


def rows_of(
    prior: Prior, teacher: Classifier, latents: Tensor, decoders: dict[str, Callable[[], Decoder]], judged: bool
) -> dict[str, Callable[[], Work]]:
    """The gradient of the demo's losses through the VAE and each decoder, on all latents in one call."""
    labels = torch.arange(len(latents), device=latents.device) % len(teacher.class_names)
    losses = losses_of(demo.settings(len(latents), latents.device).guidance)

    def gradient(decode: Decode) -> Callable[[], Tensor]:
        guidance = Guidance(decode, teacher, losses)
        return lambda: guidance.gradient(latents, labels, len(latents))[0]

    exact = cache(gradient(prior.decode))

    def tiny(make: Callable[[], Decoder]) -> Work:
        decoder = make()
        call, facts = gradient(decoder), {"parameters": sum(p.numel() for p in decoder.network.parameters())}
        if judged:
            with torch.no_grad():
                error = 255 * (decoder(latents) - prior.decode(latents)).abs().mean()
            cosine = F.cosine_similarity(call().flatten(1), exact().flatten(1)).mean()
            facts |= {"image error": float(error), "gradient cosine": float(cosine)}
        return Work(call, len(latents), facts=facts)

    own = sum(p.numel() for p in prior.vae.decoder.parameters())
    found: dict[str, Callable[[], Work]] = {
        VAE: lambda: Work(gradient(prior.decode), len(latents), facts={"parameters": own})
    }
    return found | {name: partial(tiny, make) for name, make in decoders.items()}


def trained(prior: Prior, folder: Path, device: torch.device, width: int, blocks: int, **settings: Any) -> Decoder:
    """A decoder of dfkd-train-decoder; one that is in the folder is taken as it is."""
    config = DecoderTrainConfig.of(
        **{"width": width, "blocks": blocks, "sample_steps": 8, "device": str(device), "weights": "fp32", **settings}
    )
    return Decoder.from_pretrained(train_decoder(prior, config, folder), device=device)


def untrained(prior: Prior, folder: Path, device: torch.device) -> Decoder:
    """TAESD's sizes with the weights that torch begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_decoder(make_decoder(prior, *TAESD), folder, torch.float32)
    return Decoder.from_pretrained(folder, device=device)


def groups(device: torch.device, work: Path, teacher: Path | None, steps: int, images: int) -> Iterator[Group]:
    """work: folder for the decoders. steps, images: of their training."""
    short = {"steps": steps, "images": images, "warmup": min(100, steps // 4)}
    prior = Prior.from_pretrained("demo").to(device)
    judge = demo.teacher(teacher).freeze(device)
    own = {
        f"tiny, width {width}": partial(trained, prior, work / f"demo-{width}", device, width, 1, **short)
        for width in WIDTHS
    }
    yield Group("demo", VAE, rows_of(prior, judge, estimates(prior, IMAGES[device.type], ()), own, judged=True))

    random = sd15.make_teacher(thin=True).freeze(device)
    thin = sd15.make_prior(THIN_SIDE, "fp32", thin=True).to(device)
    settings = {**short, "classes": ("one", "two")}
    own = {"tiny, width 16": partial(trained, thin, work / "sd15-thin", device, 16, 1, **settings)}
    latents = estimates(thin, IMAGES["cpu"], ("one", "two"))
    yield Group("Stable Diffusion 1.5, thin", VAE, rows_of(thin, random, latents, own, judged=True))

    side = SIDES[device.type]
    # The gradient does not meet the UNet, which may stay thin.
    vae = sd15.random(lambda: AutoencoderKL(**sd15.VAE), torch.float32, 1).to(memory_format=torch.channels_last)
    full = replace(sd15.make_prior(side, "fp32", thin=True), vae=vae).to(device)
    latents = torch.randn(1, full.latent_channels, *full.latent_size or (), device=device)
    own = {"tiny, TAESD's sizes": partial(untrained, full, work / "sd15", device)}
    yield Group(f"Stable Diffusion 1.5, {side}x{side}", VAE, rows_of(full, random, latents, own, judged=False))


def estimates(prior: Prior, count: int, words: tuple[str, ...]) -> Tensor:
    """Clean latents [count, C, h, w]: estimates at steps in turn of trajectories that no training has seen."""
    trajectories = Trajectories(prior, SamplingConfig(steps=8), words)
    kept = (torch.arange(count) % len(trajectories.table))[:, None]
    return trajectories.estimates(torch.arange(count), SEED, kept)[:, 0]


def main() -> None:
    p = driver.parser(__doc__)
    p.add_argument("--teacher", type=Path, help="folder of the demo's teacher (default: random weights)")
    p.add_argument("--work", type=Path, default=Path("runs/guidance-decoder"), help="folder of the decoders, kept")
    p.add_argument("--steps", type=int, default=1500, help="of their training (default 1500)")
    p.add_argument("--images", type=int, default=256, help="trajectories of their training (default 256)")
    a = p.parse_args()
    whose = "a trained teacher's" if a.teacher else "a random teacher's"
    note = f"Decoders were trained in {a.steps} steps; gradients are {whose}. "
    driver.run(groups(a.device, a.work, a.teacher, a.steps, a.images), a, "bench_guidance_decoder", note=note)


if __name__ == "__main__":
    main()
