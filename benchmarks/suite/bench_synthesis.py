"""From noise to shards: the published loop one image at a time beside ours, and unguided sampling beside diffusers.

published, unet, latent  of benchmarks/guidance_paths.py: the `demo` preset (latent) and what it changes, shards written
diffusers                StableDiffusionPipeline on the embedded prior, without a teacher, to images in memory
diffusers compiled       the same by its documentation's recipe (benchmarks/diffusers_peers.py); in the full suite alone
ours                     the same scheduler, steps and classifier-free guidance in every step, to images in memory; the
                         teacher looks at each of them once
"""

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.guidance_paths import ROWS
from benchmarks.suite import demo
from benchmarks.suite.case import Absent, Group, Place, Work
from dfkd.cli.generate_options import EMBEDDED_PRIOR
from dfkd.runtime import choose_kernels
from dfkd.presets import PRESETS
from dfkd.data.shards import ShardFolder
from dfkd.synthesis.run import Rows, Synthesis, synthesise
from dfkd_engine.backends import get

UNGUIDED: dict[str, Any] = {"guidance_step": 0, "cfg_to": 1}  # diffusers has no interval of guidance


def steps(place: Place) -> dict[str, Any]:
    return {"steps": 4} if place.quick else {}


def written(own: Synthesis, images: int, folder: Path) -> None:
    """`images` of them into a folder of one shard, which is removed."""
    rows, size = Rows(own.group, own.group, own.group), own.latent_size[0] * own.prior.vae_scale_factor
    with tempfile.TemporaryDirectory(dir=folder) as path:
        layout = ({}, own.teacher.class_names, size, "png", images, images)
        with ShardFolder.create_or_open(Path(path), *layout) as shards:
            synthesise(shards, own, rows, lambda count: None)


def synthesis(path: str, place: Place) -> Work:
    group, images = (1, 1 if place.quick else 2) if path == "published" else (demo.images(place),) * 2
    kernels = "torch" if path == "published" else choose_kernels("auto", place.device).name
    own = demo.synthesis(place, group, ROWS[path] | steps(place), kernels)
    return Work(partial(written, own, images, place.folder), images)


@cache  # compiling takes its time: a second turn has the same pipeline
def diffusers_pipeline(place: Place, compiled: bool = False) -> Work:
    from benchmarks import diffusers_peers

    preset = {**PRESETS["demo"].generate, **steps(place)}
    assert preset["sampler"] == "ddim"
    peer = diffusers_peers.of_folder(EMBEDDED_PRIOR, place.device)
    if compiled:
        if (why := get("inductor").unusable(place.device, "float32")) is not None:
            raise Absent(why)
        peer = diffusers_peers.compiled(peer)
    count = demo.images(place)
    prompts = [str(preset["prompt"]).format(label=demo.CLASSES[i % len(demo.CLASSES)]) for i in range(count)]
    settings = {"num_inference_steps": preset["steps"], "guidance_scale": preset["cfg"]}

    def run() -> None:
        with torch._inductor.config.patch(dict(peer.inductor)):
            peer.pipeline(prompts, **settings)

    return Work(run, count)


def unguided(place: Place) -> Work:
    count = demo.images(place)
    kernels = choose_kernels("auto", place.device).name
    own = demo.synthesis(place, count, UNGUIDED | steps(place), kernels)
    return Work(partial(own.sample, 0, count), count)


def groups(device: torch.device, quick: bool) -> list[Group]:
    peers = {"diffusers": diffusers_pipeline, "ours": unguided}
    if not quick:
        peers["diffusers compiled"] = partial(diffusers_pipeline, compiled=True)
    return [
        Group("synthesis", "published", {path: partial(synthesis, path) for path in ROWS}, "images"),
        Group("unguided sampling", "diffusers", peers, "images"),
    ]


def test_synthesis(paired: Callable[[], None]) -> None:
    paired()
