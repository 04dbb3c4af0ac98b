"""The rows of the waterfall: which technique each adds, and the networks and settings that it is run with."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.guidance_paths import ROWS
from benchmarks.published_loop import PublishedLoop
from dfkd.cli.generate import build_command
from dfkd.cli.generate_options import GenerateOptions
from dfkd.cli.prepare import prepare
from dfkd.compiled.choose import apply, choose, in_words
from dfkd.compiled.requests import gradient_rows, rows_per_call
from dfkd.compiled.sources import sources_of
from dfkd.runtime import choose_kernels
from dfkd.data.shards import Record, ShardFolder
from dfkd.synthesis.prompts import labels_of, prompt_of
from dfkd.synthesis.run import Rows, Synthesis, synthesise
from dfkd.synthesis.sampler import INITIAL_NOISE
from dfkd_engine.store import EngineStore
from dfkd_kernels.philox import philox_normal

START, FIXED, ALGORITHM = "start", "fixed", "algorithm"


@dataclass(frozen=True)
class Technique:
    """What a row adds to the one before.

    takes    options in which the row leaves the published settings for the preset's
    single   one image at a time; nchw: weights in the order of NCHW; kernels, engines: as `dfkd-generate` chooses
             them, eager networks and PyTorch without
    """

    name: str
    kind: str
    what: str
    takes: tuple[str, ...] = ()
    single: bool = False
    nchw: bool = False
    kernels: bool = False
    engines: bool = False


PUBLISHED = Technique("published", START, "`benchmarks/published_loop.py`", single=True, nchw=True)
TECHNIQUES = (
    PUBLISHED,
    Technique("our sampler", FIXED, "the same by dfkd's sampler", single=True, nchw=True),
    Technique("groups", FIXED, "a group of images a network call, each with its own statistics", nchw=True),
    Technique("channels_last", FIXED, "weights in the order of NHWC"),
    Technique("clean latent", ALGORITHM, "the gradient stops at the clean latent: one UNet call a step", ("gradient",)),
    Technique("early cfg", ALGORITHM, "classifier-free guidance in the first steps alone", ("cfg_to",)),
    Technique("late guidance", ALGORITHM, "the teacher guides in the last steps alone", ("guide_from",)),
    Technique("group statistics", ALGORITHM, "BatchNorm statistics of a group of mixed classes", ("bn_stats",)),
    Technique("repeats", ALGORITHM, "several guidance steps at a noise level", ("guidance_repeats",)),
    Technique("refinement", ALGORITHM, "guidance steps on the finished pixels", ("refine_steps",)),
    Technique("fused kernels", FIXED, "what a step is beside the networks, in Triton", kernels=True),
    Technique("engines", FIXED, "the networks compiled, by `--backend auto`", kernels=True, engines=True),
)


def overrides(technique: Technique) -> dict[str, Any]:
    """The options of a row that are not the preset's."""
    until = TECHNIQUES[: TECHNIQUES.index(technique) + 1]
    taken = {option for one in until for option in one.takes}
    return {name: value for name, value in ROWS["published"].items() if name not in taken}


def techniques(device: torch.device) -> list[Technique]:
    """The rows of a device: without Triton's where `dfkd-generate` would not take it."""
    fused = choose_kernels("auto", device).name == "triton"
    return [one for one in TECHNIQUES if fused or not (one.kernels and not one.engines)]


@dataclass(frozen=True)
class Way:
    """A row made ready.

    run(folder)   writes the images 0 to `images` - 1 into a new folder, as shards
    synthesis     its settings and networks; of the published loop, those of our sampler's row
    how           which engines were taken, for people
    """

    run: Callable[[Path], object]
    images: int
    synthesis: Synthesis
    how: tuple[str, ...] = ()


def way(technique: Technique, options: GenerateOptions, singles: int, engines: Path) -> Way:
    """Load the row's networks, and its engines where it has them."""
    kernels = choose_kernels("auto" if technique.kernels else "torch", torch.device(options.device)).name
    synthesis, how = prepare(options, kernels), ()
    rows, images = Rows(rows_per_call(options), rows_per_call(options), gradient_rows(options)), options.group
    if technique.nchw:
        for network in (synthesis.prior.unet, synthesis.prior.vae, synthesis.teacher.module):
            network.to(memory_format=torch.contiguous_format)
    if technique.engines:
        store = EngineStore(engines)
        choices = choose(options, store, build_command(options))
        synthesis, how = apply(synthesis, sources_of(synthesis), choices, store), tuple(in_words(choices))
    if technique.single:
        rows, images, synthesis = Rows(1, 1, 1), singles, replace(synthesis, group=1)
    if technique is PUBLISHED:
        return Way(partial(write_published, PublishedLoop.of(synthesis), synthesis, images), images, synthesis)
    return Way(partial(write, synthesis, rows, images), images, synthesis, how)


def shards(path: Path, synthesis: Synthesis, images: int) -> ShardFolder:
    """A new folder of one shard."""
    size = synthesis.latent_size[0] * synthesis.prior.vae_scale_factor
    return ShardFolder.create_or_open(path, {}, synthesis.teacher.class_names, size, "png", images, images)


def write(synthesis: Synthesis, rows: Rows, images: int, path: Path) -> None:
    with shards(path, synthesis, images) as folder:
        synthesise(folder, synthesis, rows, lambda _: None)


def write_published(loop: PublishedLoop, synthesis: Synthesis, images: int, path: Path) -> None:
    """The same images by the published loop, one after another, written as a shard like those of every row."""
    prior, shape = synthesis.prior, (synthesis.prior.latent_channels, *synthesis.latent_size)
    pixels, records = [], []
    for index in range(images):
        ids = torch.tensor([index])
        label = int(labels_of(ids, synthesis.classes))
        name = synthesis.teacher.class_names[label]
        prompt = prompt_of(synthesis.prompt, name)
        noise = philox_normal(synthesis.seed, ids.to(synthesis.device), INITIAL_NOISE, shape)
        embeddings = prior.encode_prompts([prompt]), prior.encode_prompts([synthesis.negative_prompt])
        image = loop(noise.to(prior.dtype), label, *embeddings)
        pixels.append((image * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
        records.append(Record(index, label, name, synthesis.seed, prompt))
    with shards(path, synthesis, images) as folder:
        folder.write(0, torch.cat(pixels).contiguous().numpy(), records)
