"""float16 priors whose VAE leaves float16's range: which of them decode in float32, as diffusers' pipelines do."""

import json
import shutil

import pytest
import torch

from dfkd_engine.priors.prior import Prior

HALF, FULL = torch.float16, torch.float32


@pytest.mark.parametrize(
    ("name", "forced", "dtype", "wanted"),
    [
        ("sdxl", True, "fp16", FULL),
        ("sdxl", None, "fp16", FULL),  # AutoencoderKL's default
        ("sdxl", False, "fp16", HALF),  # of a VAE that was tuned to the range
        ("sdxl", True, "bf16", torch.bfloat16),
        ("sd1", True, "fp16", HALF),  # its pipeline decodes in the denoiser's dtype whatever the config says
    ],
)
def test_the_dtype_of_a_vae(tiny_prior, tmp_path, name, forced, dtype, wanted):
    folder = shutil.copytree(tiny_prior(name), tmp_path / "prior")
    config = json.loads((folder / "vae/config.json").read_text())
    config.pop("force_upcast", None)
    (folder / "vae/config.json").write_text(json.dumps(config | ({} if forced is None else {"force_upcast": forced})))
    prior = Prior.from_pretrained(folder, dtype=dtype)
    assert prior.vae.dtype == wanted
    assert prior.dtype == {"fp16": HALF, "bf16": torch.bfloat16}[dtype]
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images, exact = prior.decode(z), Prior.from_pretrained(folder).decode(z)
    assert torch.equal(images, exact) == (wanted == FULL)  # the weights were never rounded
