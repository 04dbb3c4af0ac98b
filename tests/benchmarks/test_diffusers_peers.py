"""Our sampler without a teacher is diffusers' pipeline: the same images from the same noise, steps and embeddings."""

from dataclasses import replace

import pytest
import torch

from benchmarks import sd15
from benchmarks.diffusers_peers import TUNED, compiled, of_folder, of_prior
from benchmarks.sd15_sampling import SCHEDULER
from dfkd.cli.generate_options import EMBEDDED_PRIOR
from dfkd.synthesis.sampler import INITIAL_NOISE, SamplerSettings, sample_group
from dfkd.synthesis.schedule import build_table
from dfkd_engine.networks import load_prior
from dfkd_kernels.philox import philox_normal

CPU = torch.device("cpu")
SEED, IMAGES, CFG = 5, 3, 2.0


@pytest.fixture(scope="module")
def thin():
    """A thin prior of Stable Diffusion 1.5's layers, and embeddings that differ, without which no scale would show."""
    prior = sd15.placed(sd15.make_sources(64, thin=True), CPU, torch.float32).prior
    random = torch.Generator().manual_seed(0)
    return replace(prior, _encoded={word: torch.randn(77, 32, generator=random) for word in ("", "a", "b", "c")})


def both(prior, scheduler, prompts, steps, peer):
    """Images of ours and of the peer."""
    ids = torch.arange(len(prompts))
    context, empty = prior.encode_prompts(prompts), prior.encode_prompts([""])
    table, settings = build_table(scheduler, "ddim", steps), SamplerSettings(cfg=CFG)
    ours = sample_group(
        prior, None, table, settings, SEED, ids, torch.zeros_like(ids), context, empty, prior.latent_size, len(ids)
    )
    shape = (prior.latent_channels, *prior.latent_size)
    return ours.images, peer(philox_normal(SEED, ids, INITIAL_NOISE, shape), context, empty, steps, CFG)


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_ours_and_the_pipelines_images_agree(thin, steps):
    """Steps that divide 1000 and that do not. Only rounding differs: our coefficients are multiplied out before."""
    ours, theirs = both(thin, SCHEDULER, ["a", "b", "c"], steps, of_prior(thin, SCHEDULER))
    assert ours.std() > 0.1 and ((ours > 0) & (ours < 1)).float().mean() > 0.5  # or clamping would hide a difference
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-4)


def test_the_compiled_pipeline_is_the_same_on_copies(thin, monkeypatch):
    """As diffusers documents it; what torch.compile makes of it is PyTorch's affair."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: asked.append(options) or call)
    plain = of_prior(thin, SCHEDULER)
    peer = compiled(plain)
    ours, theirs = both(thin, SCHEDULER, ["a", "b", "c"], 4, peer)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-4)
    assert asked == 2 * [{"mode": "max-autotune", "fullgraph": True}] and peer.inductor == TUNED
    assert plain.pipeline.unet is thin.unet and "Fused" not in str(thin.unet.attn_processors)
    assert "Fused" in str(peer.pipeline.unet.attn_processors) and compiled(plain, "default").inductor == {}


def test_the_settings_of_the_compiler_end_with_the_call(thin):
    before = {name: getattr(torch._inductor.config, name) for name in TUNED}
    seen = {}
    peer = replace(of_prior(thin, SCHEDULER), inductor=TUNED)
    run = peer.pipeline.unet.forward

    def forward(*given, **named):
        seen.update({name: getattr(torch._inductor.config, name) for name in TUNED})
        return run(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer.pipeline.unet, "forward", forward)
        both(thin, SCHEDULER, ["a"], 1, peer)
    assert seen == TUNED != before == {name: getattr(torch._inductor.config, name) for name in TUNED}


def test_a_pipeline_folder_gives_the_images_of_the_prior_in_it():
    """The demo's: it predicts v, and its timesteps trail."""
    prior = load_prior(EMBEDDED_PRIOR)
    prompts = [f"a photo of a {digit}" for digit in ("seven", "two")]
    ours, theirs = both(prior, prior.scheduler_config, prompts, 8, of_folder(EMBEDDED_PRIOR, CPU))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)
