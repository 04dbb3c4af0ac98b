"""A Stable Diffusion 1.5 of reduced width goes through dfkd-generate: 4x64x64 latents, 512x512 images, both paths."""

import pytest
import torch

from dfkd.cli import generate
from tests.cli.small_generate import images_of, last_line, save_classifier, status_of
from tests.tiny_sd import make_tiny_sd

# Thinner than tests/tiny_sd.py's: at 64x64 latents its attention takes two seconds a row on one core.
THIN = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 8, "layers_per_block": 1, "attention_head_dim": 2}


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return make_tiny_sd(tmp_path_factory.mktemp("sd") / "prior", unet=THIN)


@pytest.mark.parametrize("path, count, steps", [("latent", 2, 2), ("unet", 1, 1)])
def test_end_to_end(prior, tmp_path, capfd, path, count, steps):
    teacher = save_classifier(tmp_path / "teacher", size=32)
    argv = ["--prior", prior, "--teacher-checkpoint", teacher, "--out", tmp_path / "out", "--device", "cpu"]
    argv += ["--count", count, "--group", count, "--micro-batch", 1, "--steps", steps, "--cfg", 3]
    assert status_of(generate.main, *argv, "--gradient", path, "--prompt", "an image of {label}") == 0
    streams = capfd.readouterr()
    assert last_line(streams.out)["images_written"] == count
    lines = streams.err.splitlines()  # quiet but for what runs the networks and what is done
    start = int(path == "latent")
    assert [": eager (no engine is built" in line for line in lines[:start]] == [True] * start
    assert lines[start] == "kernels: torch (the device is cpu)"
    assert lines[start + 1].startswith(f"{count} images of 512x512")
    assert lines[start + 2].startswith("plan: ") and lines[-1].startswith("predicted: ")
    pool = images_of(tmp_path / "out")
    assert pool.images.shape == (count, 3, 512, 512) and pool.labels.tolist() == list(range(count))
    assert pool.images.float().std() > 1 and (count == 1 or not torch.equal(pool.images[0], pool.images[1]))
    record = pool.records[0]
    assert record.prompt == "an image of zero" and {len(curve) for curve in record.loss_curve.values()} == {steps}
    assert pool.settings["size"] == 512 and pool.settings["scheduler"]["_class_name"] == "PNDMScheduler"
