"""Every family of priors: unguided it draws what diffusers' own pipeline draws, and guided it follows the gradient."""

import json
import shutil

import pytest
import torch

from dfkd.config import GenerateConfig
from dfkd.errors import UsageError
from dfkd.synthesis import pack as pack_module
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd_engine.priors.prior import Prior
from dfkd_kernels.philox import philox_normal
from tests.synthesis.small_networks import classifier, plain_loss
from tests.tiny_priors import SIDE, SIZE, unguided

SEED, IDS, RHO = 5, torch.arange(3), 0.15
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp2m": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}
FLOW = "FlowMatchEulerDiscreteScheduler"
NAMES = {"dit": ["zero", "one", "Two"], "pixels": ["", "", ""], "pixels-flat": ["", "", ""]}  # as diffusers wants them
UNGUIDED = {"guidance_step": 0.0}
CASES = [  # prior, sampler, steps, cfg
    ("sd1", "ddim", 4, 3.0),
    ("sd1", "euler", 4, 0.5),  # up to 1 is the prompt alone
    ("sd2", "ddim", 4, 3.0),
    ("sd2", "dpmpp2m", 4, 3.0),
    ("sd-turbo", "euler", 1, 1.0),
    ("sd-turbo", "euler", 4, 1.0),
    ("lcm", "lcm", 1, 8.0),
    ("lcm", "lcm", 4, 8.0),
    ("sdxl", "euler", 4, 5.0),
    ("sdxl", "ddim", 4, 1.0),
    ("sdxl-turbo", "euler-ancestral", 1, 1.0),
    ("sdxl-turbo", "euler-ancestral", 4, 1.0),
    ("dit", "ddim", 4, 4.0),
    ("dit", "dpmpp2m", 4, 1.0),
    ("sd3", "euler", 4, 7.0),
    ("sd3-t5", "euler", 4, 1.0),
    ("sd3-t5", "euler", 4, 7.0),
    ("pixels", "ddpm", 4, 1.0),
    ("pixels", "ddim", 4, 1.0),
    ("pixels-flat", "ddpm", 4, 1.0),
    ("class-pixels", "ddim", 4, 3.0),
    ("class-pixels", "ddim", 4, 1.0),
    ("class-latents", "ddim", 4, 3.0),
]


def pipeline(folder, **settings):
    config = GenerateConfig.of(**{"device": "cpu", "backend": "eager", "kernels": "torch", **settings})
    return GuidedPipeline(Prior.from_pretrained(folder), classifier(size=SIDE), config)


def doubled(pipe, monkeypatch):
    """The pipeline turned to float64, with the noise of float32."""
    draw = pack_module.philox_normal
    monkeypatch.setattr(pack_module, "philox_normal", lambda *key: draw(*key).double())
    for network in (*pipe.prior.networks.values(), pipe.teacher.module):
        network.double()
    return pipe


def drawn(pipe):
    """Images [3, 3, H, W] in 0..1 of the classes zero, one and two."""
    pack = pipe.pack(IDS, SEED)
    return pipe.decode(pipe.latents(pack))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name, sampler, steps, cfg", CASES, ids=lambda value: str(value))
def test_unguided_it_is_diffusers_own_pipeline(name, sampler, steps, cfg, dtype, tiny_prior, monkeypatch):
    folder = tiny_prior(name)
    own = {} if name in ("pixels", "pixels-flat") else {"cfg": cfg}  # a scale that could not act would be refused
    pipe = pipeline(folder, sampler=sampler, steps=steps, **own, **UNGUIDED)
    if dtype == torch.float64:
        doubled(pipe, monkeypatch)
    shape = (3, SIDE, SIDE) if pipe.prior.pixels else (4, SIZE, SIZE)
    noise = [philox_normal(SEED, IDS, stream, shape) for stream in range(1 + steps)]
    expected = unguided(
        folder,
        noise[0],
        NAMES.get(name, [pipe.prior.prompt.format(label=label) for label in ("zero", "one", "two")]),
        scheduler=FLOW if name.startswith("sd3") else SCHEDULERS[sampler],
        steps=steps,
        cfg=cfg,
        options={"clip_sample": False} if sampler == "ddim" and not pipe.prior.pixels else {},  # DDIM clips by default
        between=noise[1:] if sampler in ("ddpm", "euler-ancestral", "lcm") else (),
        dtype=dtype,
    )
    # float32: the layers' rounding in another memory layout, through all steps. float64: diffusers' schedulers hold
    # their levels in float32, 1e-7 of each, and its time embeddings are float32 in either.
    torch.testing.assert_close(drawn(pipe), expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("negative", ["", "a photo of two"])
@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3-t5"])
def test_the_unconditional_rows_are_diffusers(name, negative, zeros, tiny_prior, tmp_path, monkeypatch):
    """Of the empty prompt, zeros where SDXL's model_index.json says so; of a negative prompt, that prompt's."""
    folder = tiny_prior(name)
    if name == "sdxl":
        folder = shutil.copytree(folder, tmp_path / name)
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
    sampler = "euler" if name == "sd3-t5" else "ddim"
    own = {"sampler": sampler, "steps": 2, "cfg": 4.0, "negative_prompt": negative}
    pipe = doubled(pipeline(folder, **own, **UNGUIDED), monkeypatch)
    expected = unguided(
        folder,
        philox_normal(SEED, IDS, 0, (4, SIZE, SIZE)),
        [pipe.prior.prompt.format(label=label) for label in ("zero", "one", "two")],
        scheduler=FLOW if name == "sd3-t5" else SCHEDULERS[sampler],
        steps=2,
        cfg=4.0,
        negative=negative or None,
        options={"clip_sample": False} if sampler == "ddim" else {},
        dtype=torch.float64,
    )
    torch.testing.assert_close(drawn(pipe), expected, rtol=0, atol=1e-6)  # as above


@pytest.mark.parametrize("path", ["latent", "unet"])
@pytest.mark.parametrize(
    "name, settings",
    [
        ("sd2", {"cfg": 3.0}),
        ("sd-turbo", {"sampler": "euler", "cfg": 1.0}),
        ("lcm", {"sampler": "lcm", "cfg": 8.0, "steps": 1}),  # of one step: no noise is drawn behind it
        ("sdxl", {"sampler": "euler", "cfg": 5.0}),
        ("dit", {"cfg": 4.0}),
        ("sd3", {"sampler": "euler", "cfg": 7.0}),
        ("pixels", {}),
        ("class-pixels", {"cfg": 3.0}),
        ("class-latents", {"cfg": 3.0}),
    ],
)
def test_guided_it_is_its_naive_loop(name, settings, path, tiny_prior, monkeypatch):
    own = {"steps": 2, "gradient": path, "guidance_step": RHO, "bn_stats": "image", "bn_weight": 0.3, "cls_weight": 0.7}
    pipe = doubled(pipeline(tiny_prior(name), **(own | settings)), monkeypatch)
    got = pipe.latents(pipe.pack(IDS, SEED))
    # float64 throughout; 1e-12 under a root in L_bn and the rounding of the steps stay below this
    torch.testing.assert_close(got, naive(pipe, path), rtol=1e-7, atol=1e-7)


def naive(pipe, path):
    """Guided sampling written out with autograd. The guidance step moves z0hat (or z), and eps is held meanwhile."""
    prior, table = pipe.prior, pipe.table
    given = prior.conditions([pipe.prompt.format(label=name) for name in pipe.class_names], pipe.image_size, pipe.cfg)
    free = prior.unconditional("", pipe.image_size) if prior.family.cfg == "rows" and pipe.cfg > 1 else None
    z = table.init_scale * philox_normal(SEED, IDS, 0, (prior.latent_channels, *pipe.latent_size)).double()

    def bounded(z0):
        return z0 if table.clip is None else z0.clamp(-table.clip.limit, table.clip.limit)

    def direction(of_latent, point):
        leaf = point.clone().requires_grad_()
        loss = plain_loss(prior, pipe.teacher, of_latent(leaf), IDS, 0.3, 0.7, "image", "norm")
        (gradient,) = torch.autograd.grad(loss, leaf)
        return torch.stack([x / x.square().mean().sqrt() for x in gradient])

    for i in range(len(table)):

        def model(z, i=i):
            m = prior.denoise(z, table.timesteps[i].float(), *given)
            if free is None:
                return m
            row = [none.expand_as(own) for none, own in zip(free, given, strict=True)]
            without = prior.denoise(z, table.timesteps[i].float(), *row)
            return without + pipe.cfg * (m - without)

        def clean(z, i=i, model=model):
            return table.z0_z[i] * z + table.z0_model[i] * model(z)

        if path == "unet":
            z = z - RHO * direction(clean, z)
        z0 = bounded(clean(z))
        if path == "latent":
            z0 = bounded(z0 - RHO * direction(lambda z0: z0, z0))
        z = table.step_z[i] * z + table.step_model[i] * model(z) + table.step_z0[i] * (z0 - clean(z))
    return z


@pytest.mark.parametrize("name, size, message", [("dit", 18, "a multiple of 4"), ("sd3", 52, "at most 48")])
def test_a_size_that_the_denoiser_cannot_take(name, size, message, tiny_prior):
    pipeline(
        tiny_prior(name), size=size - 4 if name == "sd3" else size + 2, sampler="euler" if name == "sd3" else "ddim"
    )
    with pytest.raises(UsageError, match=f"--size {size} does not fit the prior.*{message}"):
        pipeline(tiny_prior(name), size=size)
