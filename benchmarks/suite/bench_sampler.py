"""One guided denoising step of the demo, network calls included and the picture at the end left out.

published   one image, gradient through the UNet, classifier-free, two UNet calls (benchmarks/guidance_paths.py)
unet        a late step of the `demo` preset with the same gradient: a group, guidance repeated, no classifier-free rows
latent      the same with the gradient through decoder and teacher alone; with Triton's launches where there is a GPU
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.guidance_paths import ROWS
from benchmarks.suite import demo
from benchmarks.suite.case import Group, Place, Work
from dfkd.runtime import choose_kernels
from dfkd.synthesis.prompts import labels_of, prompt_of
from dfkd.synthesis.sampler import sample_group
from dfkd_engine.networks import Prior

LATE = 6  # of the preset's 8 steps, counted from 0


class Undecoded(Prior):
    """The same networks; guidance, which holds a decoder of its own, decodes, and the sampler's end does not."""

    def decode(self, z0: Tensor) -> Tensor:
        return z0


def step(path: str, kernels: str, place: Place) -> Work:
    choose_kernels(kernels, place.device)  # raises where they are not here
    images = 1 if path == "published" else demo.images(place)
    own = demo.synthesis(place, images, ROWS[path], kernels)
    cfg = own.settings.cfg if path == "published" else 1.0
    settings = replace(own.settings, guide_from=0.0, guide_to=1.0, cfg=cfg, refine_steps=0)
    ids = torch.arange(images)
    labels = labels_of(ids, own.classes)
    words = [prompt_of(own.prompt, own.teacher.class_names[label]) for label in labels.tolist()]
    prior = Undecoded(**{f.name: getattr(own.prior, f.name) for f in fields(Prior)})
    call = partial(
        sample_group,
        prior,
        own.guidance,
        demo.one_step(own.table, LATE),
        settings,
        own.seed,
        ids.to(place.device),
        labels.to(place.device),
        own.prior.encode_prompts(words),
        own.prior.encode_prompts([own.negative_prompt]),
        own.latent_size,
        images,
        kernels,
    )
    return Work(call, images)


def groups(device: torch.device, quick: bool) -> list[Group]:
    rows: dict[str, Callable[[Place], Work]] = {path: partial(step, path, "torch") for path in ROWS}
    rows["latent, triton"] = partial(step, "latent", "triton")
    return [Group("one guided step", "published", rows, "images")]


def test_step(paired: Callable[[], None]) -> None:
    paired()
