"""On a CPU a group in parts has the bits of a whole one: guidance amplifies what differs, "nearly" would not last."""

from dataclasses import replace

import pytest
import torch

from dfkd.cli.generate_options import EMBEDDED_PRIOR
from dfkd.cli.prepare import prepare
from dfkd.compiled.requests import CALL_UNIT
from dfkd.synthesis.guidance import LossWeights
from dfkd.synthesis.run import Synthesis
from dfkd.teachers import Classifier, build, checkpoint
from tests.compiled.small_engines import options_of

NAMES = tuple("abcdefghij")
GROUP = 40  # no multiple of a call, nor of a vector's 16 values, whose remainder is computed otherwise
STEPS = ("--steps", 3, "--guide-from", 0, "--refine-steps", 4, "--cutmix-every", 1, "--guidance-step", 0.3)


@pytest.fixture(scope="module")
def synthesis(tmp_path_factory) -> Synthesis:
    """The embedded prior and an untrained teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    checkpoint.save(
        folder, Classifier(build("resnet8_half", 10).eval(), "resnet8_half", NAMES, 32, (0.5,) * 3, (0.25,) * 3)
    )
    return prepare(options_of(EMBEDDED_PRIOR, folder, "--group", GROUP, "--cfg", 3, *STEPS))


@pytest.mark.parametrize("stats", ["group", "image"])
@pytest.mark.parametrize("micro", [CALL_UNIT, 2 * CALL_UNIT])
def test_of_the_gradient(synthesis, stats, micro):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(GROUP, synthesis.prior.latent_channels, *synthesis.latent_size, generator=generator)
    labels = torch.arange(GROUP) % len(NAMES)
    guidance = synthesis.guidance
    guidance.weights = LossWeights(10.0, 1.0, bn_stats=stats, bn_loss="relative")
    for way, point in ((guidance, latents), (guidance.on_pixels(), synthesis.prior.decode(latents).detach())):
        whole, losses = way.gradient(point, labels, GROUP)
        parts, others = way.gradient(point, labels, micro)
        assert torch.equal(whole, parts) and whole.abs().amax((1, 2, 3)).min() > 0
        assert all(torch.equal(losses[name], others[name]) for name in ("cls", "bn"))


def test_of_the_images(synthesis):
    whole, records = synthesis.sample(0, GROUP)
    for micro in (CALL_UNIT, 2 * CALL_UNIT):
        for gradient_micro in (micro, GROUP):
            parts, others = synthesis.sample(0, micro, gradient_micro)
            assert torch.equal(whole, parts)
            assert [record.losses for record in records] == [record.losses for record in others]
    assert not torch.equal(whole, replace(synthesis, seed=1).sample(0, GROUP)[0])
