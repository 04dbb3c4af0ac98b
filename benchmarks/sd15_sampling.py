"""Sampling at the sizes of Stable Diffusion 1.5, the published loop and diffusers beside ours: images a second and MFU.

    python -m benchmarks.sd15_sampling --device cuda                        512x512, bf16, random weights, no download
    python -m benchmarks.sd15_sampling --thin --size 64 --batches 2         few channels: a rehearsal on a CPU

published   one image at a time, gradient through the UNet, two UNet calls a step (DiffDFKD, arXiv 2504.00870)
unet        the same gradient, images in batches
latent      gradient through decoder and teacher alone, one UNet call a step
late        latent, the teacher guiding the last 40 % of the steps

and without a teacher, DDIM by all:

diffusers             the StableDiffusionPipeline on the same networks, eager; what these rows are compared with
diffusers compiled    the same as its documentation compiles it (benchmarks/diffusers_peers.py)
unguided              our sampler; at the end it shows the teacher the images once, as in all of our rows

Every step has classifier-free guidance, and every row the same steps and images, guided ones the same losses. Speeds
are taken in turns, in one process; ratios within a turn, to the published loop or to diffusers at the same number of
images. What the speeds of a trained prior would be they are: arithmetic does not look at weights. FLOP are counted
(benchmarks/flops.py) over one step and over two, and are exact for any number of them.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import sd15
from benchmarks.diffusers_peers import MODES, Peer, compiled, of_prior
from benchmarks.flops import counted, in_turns, peak, reason
from benchmarks.machine import describe, name_of
from dfkd.config import KERNEL_NAMES
from dfkd.cli.prepare import TORCH_DTYPES
from dfkd.compiled.functions import Sources
from dfkd.files import replace_text
from dfkd.runtime import choose_kernels
from dfkd.synthesis.guidance import Guidance, LossWeights
from dfkd.synthesis.run import Synthesis
from dfkd.synthesis.sampler import INITIAL_NOISE, SamplerSettings
from dfkd.synthesis.schedule import build_table
from dfkd_kernels.philox import philox_normal

RESULTS = Path(__file__).parent / "results"
SCHEDULER = {  # scheduler/scheduler_config.json
    "_class_name": "DDPMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "steps_offset": 1,
}
ROWS: dict[str, SamplerSettings] = {
    "published": SamplerSettings(gradient="unet", guidance_norm="none"),
    "unet": SamplerSettings(gradient="unet"),
    "latent": SamplerSettings(),
    "late": SamplerSettings(guide_from=0.6),
    "unguided": SamplerSettings(),
}
PEERS = ("diffusers", "diffusers compiled")
UNGUIDED = (*PEERS, "unguided")
SEED = 0


def synthesis(row: str, sources: Sources, images: int, steps: int, kernels: str) -> Synthesis:
    """A synthesis of groups of `images`; "published" has every image's own statistics, "unguided" no guidance."""
    prior, teacher = sources.prior, sources.teacher
    assert teacher is not None
    weights = LossWeights(0.1, 1.0, bn_stats="image" if row == "published" else "group")
    guidance = Guidance(prior.decode, teacher, weights, None, sources.loss_scale, kernels=kernels)
    return Synthesis(
        prior=prior,
        teacher=teacher,
        guidance=None if row in UNGUIDED else guidance,
        table=build_table(SCHEDULER, "ddim", steps),
        settings=ROWS[row],
        seed=SEED,
        classes=range(len(teacher.class_names)),
        group=images,
        prompt="",
        negative_prompt="",
        latent_size=sources.latent_size,
        device=prior.device,
        kernels=kernels,
    )


def peer_call(peer: Peer, sources: Sources, images: int, steps: int) -> Callable[[], torch.Tensor]:
    """A call of diffusers for the images that "unguided" samples: the same noise, embeddings, steps and scale."""
    prior = sources.prior
    shape = (prior.latent_channels, *sources.latent_size)
    latents = philox_normal(SEED, torch.arange(images, device=prior.device), INITIAL_NOISE, shape)
    context, empty = prior.encode_prompts([""] * images), prior.encode_prompts([""])
    return partial(peer, latents, context, empty, steps, ROWS["unguided"].cfg)


def flop_per_image(row: str, sources: Sources, steps: int) -> float:
    """Of all steps, decoding and, but for diffusers, the teacher's last look.

    From counts of few steps, since a step's does not change. Compiled or not, diffusers has the same.
    """
    if row in PEERS:
        peer = of_prior(sources.prior, SCHEDULER)
        one, two = (counted(peer_call(peer, sources, 2, count))[1] for count in (1, 2))
        return (one + (steps - 1) * (two - one)) / 2
    settings = replace(ROWS[row], guide_from=0.0)
    guided = 0 if row in UNGUIDED else sum(ROWS[row].guided(i, steps) for i in range(steps))

    def of(count: int, guidance: bool) -> int:
        own = synthesis(row, sources, 2, count, "torch")
        own = replace(own, settings=settings, guidance=own.guidance if guidance else None)
        return counted(lambda: own.sample(0, 2))[1]

    ends = 2 * of(1, False) - of(2, False)
    plain, with_teacher = of(1, False) - ends, of(1, True) - ends
    return (ends + guided * with_teacher + (steps - guided) * plain) / 2


def bench(
    sources: Sources, batches: list[int], steps: int, turns: int, kernels: str, mode: str = MODES[0]
) -> dict[str, Any]:
    """The result without the machine: rows, and those that failed with their reason. mode: of torch.compile."""
    device, peer = sources.prior.device, of_prior(sources.prior, SCHEDULER)
    cases = [("published", 1), *((row, batch) for row in (*ROWS, *PEERS) if row != "published" for batch in batches)]
    calls: dict[str, Callable[[], object]] = {}
    compile_seconds, failures = {}, {}
    for row, images in cases:
        name = f"{row} {images}"
        if row == "diffusers":
            calls[name] = peer_call(peer, sources, images, steps)
        elif row == "diffusers compiled":
            started = time.perf_counter()
            try:
                call = peer_call(compiled(peer, mode), sources, images, steps)
                call()
            except Exception as error:  # such as no compiler: the other rows are measured still
                failures[name] = reason(error)
                continue
            compile_seconds[name], calls[name] = time.perf_counter() - started, call
        else:
            own = synthesis(row, sources, images, steps, "torch" if row == "published" else kernels)
            calls[name] = partial(own.sample, 0, images)
    seconds, failed = in_turns(calls, turns, device)
    limit, flop = (
        peak(device, sources.prior.dtype),
        {row: flop_per_image(row, sources, steps) for row in (*ROWS, *PEERS)},
    )
    rows = []
    for row, images in cases:
        name = f"{row} {images}"
        base_row, base_images = ("diffusers", images) if row in UNGUIDED else ("published", 1)
        spent = [s / images for s in seconds.get(name, [])]
        base = [s / base_images for s in seconds.get(f"{base_row} {base_images}", [])]
        if not spent:
            continue
        rows.append(
            {
                "row": row, "images": images,
                "images_per_second": 1 / median(spent), "slowest": 1 / max(spent), "fastest": 1 / min(spent),
                "base": base_row, "ratio": median(b / s for b, s in zip(base, spent, strict=True)) if base else None,
                "flop_per_image": flop[row], "flop_per_second": flop[row] / median(spent),
                "mfu": flop[row] / median(spent) / limit if limit else None,
                "compile_seconds": compile_seconds.get(name),
            }
        )  # fmt: skip
    return {
        "steps": steps,
        "turns": turns,
        "kernels": kernels,
        "compile_mode": mode,
        "dtype": str(sources.prior.dtype).removeprefix("torch."),
        "image_size": sources.prior.vae_scale_factor * sources.latent_size[0],
        "rows": rows,
        "failures": [{"row": name, "why": why} for name, why in {**failures, **failed}.items()],
    }


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    lines = ["| row | images at a time | img/s: median (min to max) | ratio | TFLOP an image | TFLOP/s | MFU |"]
    lines.append("|" + "---|" * 7)
    for r in result["rows"]:
        cells = [
            r["row"], r["images"], f"{r['images_per_second']:.3g} ({r['slowest']:.3g} to {r['fastest']:.3g})",
            "-" if r["ratio"] is None else f"{r['ratio']:.2f} to {r['base']}", f"{r['flop_per_image'] / 1e12:.4g}",
            f"{r['flop_per_second'] / 1e12:.3g}", "-" if r["mfu"] is None else f"{100 * r['mfu']:.0f} %",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    size = result["image_size"]
    compiling = [f"{r['compile_seconds']:.0f} s for {r['images']} images" for r in result["rows"]
                 if r["compile_seconds"] is not None]  # fmt: skip
    lines += ["", f"{size}x{size}, {result['dtype']}, {result['steps']} steps, {result['turns']} turns, kernels: "
              f"{result['kernels']} (published: torch). diffusers compiled: {result['compile_mode']}, first call "
              f"{', '.join(compiling) or 'failed'}."]  # fmt: skip
    lines += [f"Not measured: {f['row']}: {f['why']}." for f in result["failures"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    batches = {"type": lambda text: [int(word) for word in text.split(",")], "default": [16]}
    parser.add_argument("--batches", **batches, help="images at a time of our rows (default 16)")  # type: ignore[arg-type]
    parser.add_argument("--repeats", type=int, default=3, help="turns (default 3)")
    parser.add_argument("--kernels", choices=KERNEL_NAMES, default="auto")
    parser.add_argument("--compile-mode", choices=MODES, default=MODES[0], help=f"of diffusers (default {MODES[0]})")
    parser.add_argument("--thin", action="store_true", help="few channels: a rehearsal, never recorded")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/sd15-sampling-<device>.json")
    a = parser.parse_args()
    if a.thin and a.record:
        parser.error("a rehearsal is not recorded")
    device = torch.device(a.device)
    sources = sd15.placed(sd15.make_sources(a.size, a.thin), device, TORCH_DTYPES[a.dtype])
    kernels = choose_kernels(a.kernels, device).name
    result = {"machine": describe(device), **bench(sources, a.batches, a.steps, a.repeats, kernels, a.compile_mode)}
    print(markdown(result), file=sys.stderr)
    if a.record:
        path = RESULTS / f"sd15-sampling-{name_of(result['machine'])}.json"
        replace_text(path, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
