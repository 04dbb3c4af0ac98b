"""The published loop of the waterfall, written with diffusers alone, and our sampler's row of the same settings."""

from functools import partial

import pytest
import torch
from benchmarks.guidance_paths import ROWS, options_of
from dfkd.cli.prepare import prepare

from benchmarks.published_loop import PublishedLoop
from dfkd.synthesis import sampler
from dfkd_kernels.philox import philox_normal
from tests.cli.small_generate import save_classifier


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("small") / "teacher", size=32, architecture="resnet8_half")


def published(teacher, *more, **overrides):
    return prepare(options_of(teacher, "cpu", teacher, ROWS["published"] | overrides, more))


def both(synthesis, image, dtype):
    """The image [1, 3, H, W] by the published loop and by our sampler, both with networks and latents of this dtype."""
    prior, ids = synthesis.prior, torch.tensor([image])
    for network in (prior.unet, prior.vae, prior.text_encoder, synthesis.teacher.module):
        network.to(dtype)
    loop = PublishedLoop.of(synthesis)
    loop.scheduler.alphas_cumprod = loop.scheduler.alphas_cumprod.to(dtype)
    shape, label = (prior.latent_channels, *synthesis.latent_size), image % 3
    prompt = prior.encode_prompts([f"a photo of the digit {synthesis.teacher.class_names[label]}"])
    negative = prior.encode_prompts([""])
    theirs = loop(philox_normal(0, ids, sampler.INITIAL_NOISE, shape, dtype), label, prompt, negative)
    settings = synthesis.guidance, synthesis.table, synthesis.settings, synthesis.seed
    given = ids, torch.tensor([label]), prompt, negative, synthesis.latent_size
    ours = sampler.sample_group(prior, *settings, *given, micro=1)
    assert ours.latents.dtype == theirs.dtype == dtype
    return theirs, prior.decode(ours.latents)


@pytest.mark.parametrize("bn_loss", ["relative", "norm"])
def test_it_is_our_published_row(teacher, bn_loss, monkeypatch):
    """In float64, over all of the preset's steps: two programs of the same arithmetic."""
    monkeypatch.setattr(sampler, "philox_normal", partial(philox_normal, dtype=torch.float64))
    theirs, ours = both(published(teacher, bn_loss=bn_loss), 1, torch.float64)
    assert (theirs - ours).abs().max() < 1e-9
    assert theirs.std() > 0.05, "an empty image would equal any other"


@pytest.mark.parametrize(("steps", "most"), [(1, 1e-6), (8, 0.5 / 255)])
def test_in_float32_rounding_is_amplified_and_not_seen(teacher, steps, most):
    """Guidance of unit length amplifies rounding at every step: after the preset's eight it is below a grey level."""
    theirs, ours = both(published(teacher, "--steps", str(steps)), 2, torch.float32)
    assert (theirs - ours).abs().mean() < most


def test_the_teacher_guides_it(teacher):
    """In every step: without guidance, or with less of it, the images are others."""
    synthesis = published(teacher, "--steps", "2")
    guided, _ = both(synthesis, 1, torch.float32)
    weaker, _ = both(published(teacher, "--steps", "2", guidance_step=0.01), 1, torch.float32)
    assert (guided - weaker).abs().mean() > 0.005


@pytest.mark.parametrize(
    ("overrides", "named"),
    [({"gradient": "latent"}, "published settings"), ({"bn_stats": "group"}, "published settings"),
     ({"sampler": "dpmpp2m"}, "DDIM")],
)  # fmt: skip
def test_other_settings_are_refused(teacher, overrides, named):
    with pytest.raises(ValueError, match=named):
        PublishedLoop.of(published(teacher, **overrides))


def test_it_has_networks_of_its_own(teacher):
    """Its hooks and its order of weights are not those of the synthesis that it was made from."""
    synthesis = published(teacher)
    loop = PublishedLoop.of(synthesis)
    assert not any(layer._forward_pre_hooks for layer in synthesis.teacher.module.modules())
    assert loop.unet.conv_in.weight.is_contiguous() and not synthesis.prior.unet.conv_in.weight.is_contiguous()
