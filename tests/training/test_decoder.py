"""A tiny decoder follows the prior's VAE on what the prior draws, and a stopped run goes on alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dfkd.config import DecoderTrainConfig, SamplingConfig
from dfkd.errors import UsageError
from dfkd.synthesis.estimates import Trajectories
from dfkd.training.decoder import train_decoder
from dfkd_engine.errors import EngineError
from dfkd_engine.priors.guidance_decoder import Decoder
from dfkd_engine.priors.prior import Prior
from tests.training.small_run import Killed, dies, lines, result

SMALL: dict[str, Any] = {
    "steps": 4,
    "batch_size": 4,
    "images": 20,
    "estimates": 2,
    "sample_steps": 4,
    "width": 8,
    "blocks": 1,
    "checkpoint_every": 2,
    "weights": "fp32",
    "device": "cpu",
}


def settings(**changes: Any) -> DecoderTrainConfig:
    return DecoderTrainConfig.of(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def prior() -> Prior:
    return Prior.from_pretrained("demo")


@pytest.fixture(scope="module")
def made(prior: Prior, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_decoder(prior, settings(), tmp_path_factory.mktemp("decoder"))


def test_what_is_written(made: Path, prior: Prior) -> None:
    decoder = Decoder.from_pretrained(made)
    decoder.check(prior)
    assert (decoder.scaling_factor, decoder.shift_factor) == (1.0, 0.0)
    z0 = torch.randn(2, *(prior.latent_channels, 8, 8))
    images = decoder(z0)
    assert images.shape == (2, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    found = result(made)
    assert found["pairs"] == 40 and 0 < found["error"] < 1
    names = {"config.json", "diffusion_pytorch_model.safetensors", "log.jsonl", "result.json"}
    assert {path.name for path in made.iterdir()} == names
    assert all(name.startswith("decoder.") for name in load_file(made / "diffusion_pytorch_model.safetensors"))


def test_diffusers_reads_it(made: Path, prior: Prior) -> None:
    from diffusers import AutoencoderTiny

    z0 = torch.randn(2, prior.latent_channels, 8, 8)
    plain = AutoencoderTiny.from_pretrained(made).eval()
    with torch.no_grad():
        torch.testing.assert_close((plain.decode(z0).sample / 2 + 0.5).clamp(0, 1), Decoder.from_pretrained(made)(z0))


def test_it_follows_the_vae(prior: Prior, tmp_path: Path) -> None:
    """150 steps halve the error of the first: the colours are there."""
    config = settings(steps=150, images=64, checkpoint_every=1000, lr=3e-3, width=16, batch_size=16, warmup=10, ema=0.9)
    train_decoder(prior, config.replace(checkpoint_every=75), tmp_path)
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert result(tmp_path)["error"] < 0.1


@pytest.mark.parametrize("step", [1, 6])
def test_a_run_that_was_killed_ends_alike(prior: Prior, made: Path, tmp_path: Path, step: int) -> None:
    """Killed while pairs are drawn, and behind the first checkpoint: two files of pairs, then a call before step 1."""
    with pytest.raises(Killed):
        train_decoder(prior, settings(), tmp_path, progress=dies(step - 1))
    assert (tmp_path / "pairs").exists()
    with pytest.raises(UsageError, match="width is 8 there and 4 here"):
        train_decoder(prior, settings(width=4), tmp_path)
    train_decoder(prior, settings(), tmp_path)
    mine, theirs = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (tmp_path, made))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_estimates_are_those_of_the_sampler(prior: Prior) -> None:
    """The clean estimate of the last step is the image that diffusers' own pipeline ends with."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from dfkd_engine import EMBEDDED
    from dfkd_kernels.philox import philox_normal

    own = Trajectories(prior, SamplingConfig(steps=4, cfg=2.0))
    assert own.prompts[3] == "a photo of the digit three"
    ids = torch.tensor([3, 13])
    last = own.estimates(ids, 5, torch.tensor([[0, 3], [1, 3]]))
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED["demo"], torch_dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    noise = philox_normal(5, ids, 0, (prior.latent_channels, *prior.latent_size))
    wanted = pipe(
        ["a photo of the digit three"] * 2,
        guidance_scale=2.0,
        num_inference_steps=4,
        latents=noise,
        output_type="latent",
    ).images
    torch.testing.assert_close(last[:, 1], wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(last[0, 0], last[0, 1])


def test_what_cannot_work_is_refused(prior: Prior, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--size 33 does not fit the prior"):
        train_decoder(prior, settings(size=33), tmp_path / "a")
    with pytest.raises(ValueError, match="--augment flip: a view of an image is no answer to its latents"):
        settings(augment="flip")
    with pytest.raises(EngineError, match="it enlarges latents of 8 channels 4 times"):
        from dataclasses import replace

        folder = train_decoder(prior, settings(steps=2, images=16), tmp_path / "b")
        Decoder.from_pretrained(folder).check(replace(prior, latent_channels=4))
    assert not (tmp_path / "a").exists()
