"""Sampling, from noise to images: the published loop and diffusers beside ours, in images a second and MFU.

    python -m benchmarks.bench_sampling                               the `demo` preset on a CPU, minutes
    python -m benchmarks.bench_sampling --teacher runs/demo/teacher --backend auto
    python -m benchmarks.bench_sampling --prior sd15 --device cuda    512x512, bf16, random weights, no download
    python -m benchmarks.bench_sampling --prior sd15 --thin --size 64 --images 2 --dtype fp32        a rehearsal

published   one image at a time, by autograd through the UNet in every step, two UNet calls a step, classifier-free
            guidance in all: plain diffusers (benchmarks/published_loop.py), what guided rows are compared with
unet        the same algorithm by our sampler, images in batches
latent      the gradient stops at the clean latent: one UNet call a step
late        the teacher guides in the last steps alone; with the demo all that its preset has: classifier-free guidance
            in the first steps alone, statistics of a group, two guidance steps at a level, refined pixels

and without a teacher, with classifier-free guidance in every step, by DDIM:

diffusers             StableDiffusionPipeline as it comes, what these rows are compared with
diffusers compiled    by the recipe of diffusers' documentation, page "Accelerate inference": channels_last, UNet and
                      vae.decode through torch.compile with fullgraph, projections fused; for max-autotune the page's
                      settings of inductor
unguided              our sampler; at the end it shows the teacher the images once, as all of our rows do

Rows run in turns in one process, ratios are taken within a turn, image for image. Arithmetic does not look at weights:
speeds are those of trained networks. FLOP are counted, for an image.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from benchmarks import demo, driver, sd15
from benchmarks.driver import Group, Work
from benchmarks.published_loop import PublishedLoop
from benchmarks.recording import names_of, scaled
from dfkd.config import DTYPES, GenerateConfig
from dfkd.synthesis.command import quieten_libraries
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd.synthesis.plan import flop_of_trajectory, needs_of
from dfkd.teachers import Classifier
from dfkd_engine.priors.prior import Prior

SEED = 0
SINGLES = 2  # images a turn of the published loop
PUBLISHED = {
    "gradient": "unet", "bn_stats": "image", "guide_from": 0.0, "guidance_repeats": 1, "cfg_to": 1.0, "refine_steps": 0
}  # fmt: skip
ROWS: Mapping[str, dict[str, Any]] = {  # what a row changes in the settings
    "published": PUBLISHED,
    "unet": PUBLISHED,
    "latent": {**PUBLISHED, "gradient": "latent"},
    "late": {},
    "unguided": {"guidance_step": 0.0, "cfg_to": 1.0},
}
PEERS = ("diffusers", "diffusers compiled")
GROUPS = {"guided sampling": ("published", "unet", "latent", "late"), "unguided sampling": (*PEERS, "unguided")}
NAMES = tuple(name for names in GROUPS.values() for name in names)
PLAIN = {"kernels": "torch", "attention": "sdpa", "backend": "eager"}  # what does not compute by our own means
MODES = ("max-autotune", "reduce-overhead", "default")  # of torch.compile; the first is the page's
TUNED = {
    "conv_1x1_as_mm": True,
    "coordinate_descent_tuning": True,
    "epilogue_fusion": False,
    "coordinate_descent_check_all_directions": True,
}


@dataclass(frozen=True)
class Networks:
    """What all rows share. config: the settings that a row changes."""

    prior: Prior
    teacher: Classifier
    config: GenerateConfig

    def pipeline(self, row: str, **changes: Any) -> GuidedPipeline:
        """Our sampler with a row's settings."""
        return GuidedPipeline(self.prior, self.teacher, self.config.replace(**ROWS[row]).replace(**changes))


def demo_networks(images: int, device: torch.device, trained: Path | None = None, **changes: Any) -> Networks:
    """The demo's; trained: folder of the teacher, None for random weights. changes: of the preset, by flat name."""
    config = demo.settings(images, device, **changes)
    return Networks(Prior.from_pretrained("demo", config.compute.dtype), demo.teacher(trained), config)


def sd15_networks(images: int, device: torch.device, dtype: str, size: int, thin: bool = False) -> Networks:
    """Stable Diffusion 1.5's, and a ResNet-34, which guides the last 40 % of ten steps."""
    own = {"group": images, "batch": images, "device": str(device), "dtype": dtype, "backend": "eager"}
    config = GenerateConfig.of(**own, steps=10, guide_from=0.6, prompt="a photo")
    return Networks(sd15.make_prior(size, dtype, thin), sd15.make_teacher(thin), config)


def published(networks: Networks, images: int) -> Callable[[], list[Tensor]]:
    """A call of the published loop for the images 0 to `images` - 1, one after another, from noise that is ours."""
    pipe = networks.pipeline("published", **PLAIN)
    loop, pack = PublishedLoop.of(pipe), pipe.pack(torch.arange(images), SEED)
    noise = (pack.start() / pipe.table.init_scale).to(pipe.prior.dtype)
    one = [slice(i, i + 1) for i in range(images)]
    given = [(noise[i], int(pack.labels[i]), pack.conditional[0][i], *pack.unconditional) for i in one]
    return lambda: [loop(*row) for row in given]


def plain_diffusers(networks: Networks, images: int, mode: str | None = None) -> Callable[[], Tensor]:
    """A call of diffusers' pipeline for the images that "unguided" samples: images in 0..1 [B, 3, H, W].

    It has copies of the networks, weights in the order of NCHW. mode: of torch.compile, whose first call compiles.
    """
    pipe = networks.pipeline("unguided", **PLAIN)
    order = torch.channels_last if mode else torch.contiguous_format
    unet, vae = (copy.deepcopy(network).to(memory_format=order) for network in (pipe.prior.denoiser, pipe.prior.vae))
    peer = StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=pipe.prior.family.text.network, tokenizer=pipe.prior.family.text.tokenizer,
        scheduler=DDIMScheduler.from_config(pipe.prior.scheduler_config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    peer.set_progress_bar_config(disable=True)
    if mode:
        peer.fuse_qkv_projections()
        peer.unet = torch.compile(unet, mode=mode, fullgraph=True)
        vae.decode = torch.compile(vae.decode, mode=mode, fullgraph=True)
    pack, side = pipe.pack(torch.arange(images), SEED), pipe.image_size
    given: dict[str, Any] = {
        "latents": (pack.start() / pipe.table.init_scale).to(pipe.prior.dtype),
        "prompt_embeds": pack.conditional[0],
        "negative_prompt_embeds": pack.unconditional[0].expand_as(pack.conditional[0]),
        "num_inference_steps": len(pipe.table),
        "guidance_scale": pipe.cfg,
    }

    def call() -> Tensor:
        with torch._inductor.config.patch(TUNED if mode == MODES[0] else {}):
            found: Tensor = peer(height=side, width=side, output_type="pt", **given).images
        return found

    return call


def flop_per_image(row: str, networks: Networks) -> int:
    """Of all calls of networks for an image, but for the teacher's last look."""
    pipe = networks.pipeline("unguided" if row in PEERS else row, **PLAIN)
    return flop_of_trajectory(pipe, needs_of(pipe))


def made(name: str, networks: Networks, images: int, mode: str = MODES[0], backend: str = "eager") -> Work:
    """A row. mode: of torch.compile. backend: of the rows that engines can take over.

    Pipelines share networks, whose kernels and attention are those of the one made last: ours come after plain ones.
    """
    flop, facts = flop_per_image(name, networks), {}
    call: Callable[[], object]
    if name == "published":
        images, call = SINGLES, published(networks, SINGLES)
    elif name in PEERS:
        call = plain_diffusers(networks, images, mode if name == PEERS[1] else None)
        if name == PEERS[1]:
            started = time.perf_counter()
            call()
            facts = {"compile s": time.perf_counter() - started}
    else:
        pipe = networks.pipeline(name, backend="eager" if name == "unet" else backend)
        call = partial(pipe, range(images), seed=SEED)
    facts |= {"images at a time": 1 if name == "published" else images, "FLOP an image": scaled(flop)}
    return Work(call, images, images * flop, facts)


def groups(
    networks: Networks, images: int, mode: str = MODES[0], backend: str = "eager", names: Sequence[str] = NAMES
) -> list[Group]:
    found = []
    for name, own in GROUPS.items():
        rows = {row: partial(made, row, networks, images, mode, backend) for row in own if row in names}
        found += [Group(name, own[0], rows, dtype=networks.prior.dtype)] if rows else []
    return found


def main() -> None:
    parser = driver.parser(__doc__)
    parser.add_argument("--prior", choices=("demo", "sd15"), default="demo")
    parser.add_argument(
        "--teacher", type=Path, help="of the demo: folder of dfkd-train-teacher (default random weights)"
    )
    parser.add_argument("--size", type=int, default=512, help="of sd15's images (default 512)")
    parser.add_argument("--thin", action="store_true", help="sd15 with few channels: a rehearsal, never recorded")
    parser.add_argument("--dtype", choices=DTYPES, help="default fp32 of the demo, bf16 of sd15")
    parser.add_argument(
        "--rows", type=names_of(NAMES), default=list(NAMES), help=f"of {', '.join(NAMES)} (default all)"
    )
    parser.add_argument("--images", type=int, help="of a call of our rows (default 200 of the demo, 16 of sd15)")
    parser.add_argument("--backend", default="eager", help="of latent, late and unguided: auto takes built engines")
    parser.add_argument("--compile-mode", choices=MODES, default=MODES[0], help=f"of diffusers (default {MODES[0]})")
    a = parser.parse_args()
    if a.thin and (a.record or a.prior == "demo"):
        parser.error("--thin is a rehearsal of --prior sd15, and not recorded")
    quieten_libraries()
    images, dtype = a.images or (200 if a.prior == "demo" else 16), a.dtype or ("fp32" if a.prior == "demo" else "bf16")
    if a.prior == "demo":
        networks = demo_networks(images, a.device, a.teacher, dtype=dtype)
    else:
        networks = sd15_networks(images, a.device, dtype, a.size, a.thin)
    steps, side = networks.config.sampling.steps, networks.prior.latent_size[0] * networks.prior.vae_scale_factor
    note = f"Prior {networks.prior.source}, {side}x{side}, {dtype}, {steps} steps, --backend {a.backend}. "
    found = groups(networks, images, a.compile_mode, a.backend, a.rows)
    driver.run(found, a, "bench_sampling", f"sampling-{a.prior}", note)


if __name__ == "__main__":
    main()
