"""The reduced priors of the other tests: each of diffusers' pipelines loads its own, and follows what it is told."""

import pytest
import torch

from tests.tiny_priors import MAKERS, SIDE, SIZE, unguided

TWO = {"dit": (("one", "three"), ("zero", "three"))}  # names of its classes
PIXELS = [name for name in MAKERS if "pixels" in name]


@pytest.mark.parametrize("name", MAKERS)
def test_its_pipeline_follows_noise_prompt_and_cfg(name, tiny_prior):
    noise = torch.randn(2, *((3, SIDE, SIDE) if name in PIXELS else (4, SIZE, SIZE)))
    scheduler = {"sd3": "FlowMatchEulerDiscreteScheduler", "sd3-t5": "FlowMatchEulerDiscreteScheduler"}
    settings = {"scheduler": scheduler.get(name, "DDIMScheduler"), "steps": 3}
    if name == "lcm":
        settings |= {"scheduler": "LCMScheduler", "between": [torch.randn(2, 4, SIZE, SIZE) for _ in range(3)]}
    first, second = TWO.get(name, (("zero", "two"), ("one", "two")))
    images = unguided(tiny_prior(name), noise, first, cfg=3.0, **settings)
    assert images.shape == (2, 3, SIDE, SIDE) and images.isfinite().all() and images.std() > 0.1
    changed = unguided(tiny_prior(name), noise, second, cfg=3.0, **settings) != images
    steered = unguided(tiny_prior(name), noise, first, cfg=1.5, **settings) != images
    conditional = name not in ("pixels", "pixels-flat")
    assert changed[0].any() == conditional and not changed[1].any()
    assert steered.any() == conditional
