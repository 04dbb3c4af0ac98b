"""The sampling loops: against loops written out with autograd, against diffusers' pipeline, and step by step."""

import os
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from dfkd.config import GenerateConfig
from dfkd.errors import UsageError
from dfkd.synthesis import cutmix
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd.synthesis.sampler import edit_noise, refine, sample, sample_through_unet, unit_rms
from dfkd.synthesis.schedule import build_table
from dfkd_engine.priors.prior import Prior
from dfkd_kernels.guided_step import paste
from dfkd_kernels.philox import philox_normal
from tests.synthesis.small_networks import (
    CHANNELS,
    SCHEDULER,
    SIDE,
    SmallPrior,
    bn_inputs,
    classifier,
    doubled,
    pipeline,
    plain_bn_loss,
    plain_loss,
)
from tests.synthesis.small_sd import make_small_sd

SEED, RHO, CFG, STEPS = 11, 0.15, 3.0, 4
IDS, LABELS = torch.arange(7), torch.tensor([0, 1, 2, 0, 1, 2, 0])
PROMPTS = [f"a {name}" for name in ("zero", "one", "two", "zero", "one", "two", "zero")]
UNGUIDED = {"guidance_step": 0.0}


def latents(pipe, ids=IDS):
    return pipe.latents(pipe.pack(ids, SEED))


def naive(prior, teacher, path, norm, stats):
    """Guided DDIM written out: arXiv 2010.02502 eq. 12 at eta = 0, with autograd where the method has a gradient."""
    scheduler = DDIMScheduler(**SCHEDULER, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    abar = scheduler.alphas_cumprod.double()
    z = philox_normal(SEED, IDS, 0, (CHANNELS, SIDE, SIDE)).double()
    words, nothing = *prior.conditions(PROMPTS), *prior.conditions([""] * len(IDS))

    def gradient(of_latent, point):
        leaf = point.clone().requires_grad_()
        loss = plain_loss(prior, teacher, of_latent(leaf), LABELS, 0.3, 0.7, stats, "norm")
        (g,) = torch.autograd.grad(loss, leaf)
        return torch.stack([x / x.square().mean().sqrt() for x in g]) if norm == "rms" else g

    for t in scheduler.timesteps:
        now = abar[t]
        after = abar[t - 1000 // STEPS] if t >= 1000 // STEPS else torch.tensor(1.0)

        def eps(z, t=t):
            free, prompted = prior.denoise(z, t, nothing), prior.denoise(z, t, words)
            return free + CFG * (prompted - free)

        def clean(z, now=now, eps=eps):
            return (z - (1 - now).sqrt() * eps(z)) / now.sqrt()

        if path == "unet":
            z = z - RHO * gradient(clean, z)
        noise, z0 = eps(z), clean(z)
        if path == "latent":
            z0 = z0 - RHO * gradient(lambda z0: z0, z0)
        z = after.sqrt() * z0 + (1 - after).sqrt() * noise
    return z


@pytest.mark.parametrize("norm", ["rms", "none"])
@pytest.mark.parametrize("stats", ["image", "group"])
@pytest.mark.parametrize("path", ["latent", "unet"])
def test_both_paths_are_their_naive_loops(monkeypatch, path, stats, norm):
    """In calls of three, so that a group's statistics take two phases."""
    own = {"gradient": path, "guidance_step": RHO, "guidance_norm": norm, "bn_stats": stats, "batch": 3}
    pipe = doubled(pipeline(**own), monkeypatch)
    expected = naive(pipe.prior, pipe.teacher, path, norm, stats)
    # float64 throughout; 1e-12 under a root in L_bn and the rounding of four steps stay below this
    torch.testing.assert_close(latents(pipe), expected, rtol=1e-8, atol=1e-8)


def test_the_paths_agree_where_the_network_ignores_its_input(monkeypatch):
    """With eps constant in z, dz0hat/dz = 1/sqrt(abar): gradients of one direction, and of that ratio."""
    pipe = doubled(pipeline(SmallPrior(coupling=0.0), cfg=1.0), monkeypatch)
    pack, alpha = pipe.pack(IDS, SEED), pipe.table.alpha[1]
    z = pack.start()
    row = pipe.table.coefficients(z)[1]

    def clean(z, images):
        return row[0] * z + row[1] * pack.denoise(z, 1, images)[0]

    through, _ = pack.gradient(pipe.guidance, z, clean)
    short, _ = pack.gradient(pipe.guidance, clean(z, IDS))
    torch.testing.assert_close(through, short / alpha, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind, scheduler", [("ddim", DDIMScheduler), ("dpmpp2m", DPMSolverMultistepScheduler)])
def test_unguided_sampling_is_diffusers_pipeline(tmp_path, kind, scheduler):
    folder = make_small_sd(tmp_path)
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    options = {"clip_sample": False} if kind == "ddim" else {}
    theirs.scheduler = scheduler.from_config(theirs.scheduler.config, **options)
    theirs.set_progress_bar_config(disable=True)
    config = GenerateConfig.of(
        steps=STEPS, cfg=CFG, prompt="a photo of {label}", sampler=kind, device="cpu", backend="eager", **UNGUIDED
    )
    pipe = GuidedPipeline(Prior.from_pretrained(folder), classifier(size=16), config)
    expected_along, along = [], []
    expected = theirs(
        ["a photo of zero", "a photo of one", "a photo of two"],
        latents=philox_normal(SEED, IDS[:3], 0, (4, 8, 8)),
        num_inference_steps=STEPS,
        guidance_scale=CFG,
        output_type="pt",
        callback_on_step_end=lambda p, i, t, found: (expected_along.append((i, float(t), found["latents"])), {})[1],
    ).images
    got = pipe(range(3), seed=SEED, callback_on_step_end=lambda p, i, t, found: along.append((i, t, found["latents"])))
    assert len(along) == STEPS
    for (i, t, mine), (step, time, wanted) in zip(along, expected_along, strict=True):
        assert (i, t) == (step, time)
        # float32: theirs divides by sqrt(abar) and adds noise in turn, ours takes the step as one row; 1e-6 a step, and
        # the first step's 1/sqrt(abar) of 15 and CFG enlarge it
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.images / 255, expected, rtol=0, atol=0.5 / 255 + 1e-4)


@pytest.mark.parametrize("path, calls", [("latent", (1, 1, 1, 1)), ("unet", (1, 2, 2, 1))])
def test_guidance_acts_inside_its_interval_alone(path, calls):
    prior, free = SmallPrior(), SmallPrior()
    pack = (pipe := pipeline(prior, gradient=path, guide_from=0.25, guide_to=0.75)).pack(IDS, SEED)
    pipe.latents(pack)
    times = pipe.table.timesteps.tolist()
    assert tuple(sum(t == time for _, t in prior.calls) for time in times) == calls
    assert {rows for rows, _ in prior.calls} == {14}  # both halves of classifier-free guidance
    shapes = {i: {name: tuple(value.shape) for name, value in of.items()} for i, of in pack.losses.items()}
    assert shapes == {i: {"cls": (7,), "bn": (7,)} for i in (1, 2)}
    latents(pipeline(free, **UNGUIDED))
    assert torch.equal(prior.seen[0], free.seen[0])


@pytest.mark.parametrize(
    "settings, rows",
    [
        ({"cfg": 2.0, "cfg_from": 0.25, "cfg_to": 0.75}, [7, 14, 14, 7]),
        ({"cfg": 1.0}, [7, 7, 7, 7]),
        ({"cfg": 0.0}, [7, 7, 7, 7]),
    ],
)
def test_classifier_free_interval(settings, rows):
    prior = SmallPrior()
    latents(pipeline(prior, **UNGUIDED, **settings))
    assert [count for count, _ in prior.calls] == rows


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_scales_up_to_1_leave_the_prompt_alone(scale):
    """As in diffusers: SD-Turbo's documented 0 does not drop the prompt."""
    found = latents(pipeline(**UNGUIDED, cfg=scale))
    assert torch.equal(found, latents(pipeline(**UNGUIDED, cfg=1.0)))
    with pytest.raises(UsageError, match="negative-prompt 'b' cannot act"):
        pipeline(**UNGUIDED, cfg=scale, negative_prompt="b")
    assert (found - latents(pipeline(**UNGUIDED, cfg=1.0, prompt="b"))).abs().max() > 0.1
    assert (found - latents(pipeline(**UNGUIDED, cfg=1.5, negative_prompt="b"))).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["ddim", "dpmpp2m"])
def test_latent_cutmix_pastes_after_its_steps(kind):
    prior, mixed = SmallPrior(), SmallPrior()
    without = latents(pipeline(prior, sampler=kind, **UNGUIDED))
    pipe = pipeline(mixed, sampler=kind, cutmix_every=2, **UNGUIDED)
    pack = pipe.pack(IDS, SEED)
    found = pipe.latents(pack)
    plan = cutmix.plan(SEED, IDS, LABELS, 1, 1.0, SIDE, SIDE)  # the only event: none follows the last step
    assert pack.plans.keys() == {1} and torch.equal(pack.plans[1].box, plan.box)
    assert torch.equal(mixed.seen[1], prior.seen[1])
    assert torch.equal(mixed.seen[2][:7], paste(prior.seen[2][:7], plan.partner, plan.box))
    assert (found - without).abs().max() > 0.01


def test_the_second_order_step_is_mixed_too(monkeypatch):
    """Two images that swap everything go on along each other's path, the previous clean estimate included."""
    whole = cutmix.CutMixPlan(torch.tensor([1, 0]), torch.tensor([[0, 0, SIDE, SIDE]] * 2), torch.zeros(2))
    monkeypatch.setattr(cutmix, "plan", lambda *_: whole)
    own = {"sampler": "dpmpp2m", "group": 2, "only": "zero", **UNGUIDED}
    mixed = latents(doubled(pipeline(**own, cutmix_every=2), monkeypatch), IDS[:2])
    plain = latents(doubled(pipeline(**own), monkeypatch), IDS[:2])
    torch.testing.assert_close(mixed, plain.flip(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", ["latent", "unet"])
def test_noise_editing_lowers_the_bn_loss_of_the_start(path):
    def start(steps):
        prior = SmallPrior()
        own = {"guide_from": 1.0, "cfg": 1.0, "noise_edit_steps": steps, "noise_edit_scale": 0.01}
        pipe = pipeline(prior, gradient=path, **own)
        latents(pipe)
        z, row = prior.seen[-STEPS], pipe.table.coefficients(prior.seen[0])[0]
        z0 = row[0] * z + row[1] * prior.denoise(z, pipe.table.timesteps[0].float(), *prior.conditions(PROMPTS))
        return z, plain_bn_loss(bn_inputs(pipe.teacher, prior.decode(z0))[1], "norm")

    (plain, before), (edited, after) = start(0), start(10)
    assert torch.equal(plain, philox_normal(SEED, IDS, 0, (CHANNELS, SIDE, SIDE)))
    assert not torch.equal(edited, plain) and after < before


@pytest.mark.parametrize("loop", [sample, sample_through_unet])
def test_repeats_are_guidance_steps_at_one_noise_level(loop):
    """Each moves the point by rho g, and the sampler's step takes their sum."""
    seen, z = [], torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = build_table(SCHEDULER, "ddim", STEPS)
    rows = table.coefficients(z)

    def guide(point, i, to_latent=None):
        assert (to_latent is None) == (loop is sample)
        seen.append((i, point))
        return torch.full_like(point, 0.1)

    def run(guide, repeats):
        return loop(z, rows, lambda z, i, images=None: torch.tanh(z)[None], guide, repeats=repeats)

    moved = run(guide, lambda i: 3 if i == 1 else 0)
    assert [i for i, _ in seen] == [1, 1, 1]
    for (_, before), (_, after) in pairwise(seen):
        torch.testing.assert_close(after, before - 0.1)
    once = run(lambda point, i, to_latent=None: torch.full_like(point, 0.3), lambda i: int(i == 1))
    torch.testing.assert_close(moved, once)


def test_refinement_and_noise_editing_are_gradient_descent():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    fine = refine(images, lambda x: x - 0.5, 8, 0.01)
    assert (fine - 0.5).square().mean() < (images - 0.5).square().mean() and fine.min() >= 0 and fine.max() <= 1
    (first,) = refine(images[:1], lambda x: x - 0.5, 1, 0.01)
    torch.testing.assert_close((first - images[0]).square().mean().sqrt(), torch.tensor(0.01), rtol=0.1, atol=0)
    torch.testing.assert_close(edit_noise(images, lambda z: 2 * z, 2, 0.25), images / 4)


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e-38])
def test_unit_gradients(size):
    """Also where squares underflow float32; zero stays zero."""
    gradient = size * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    gradient[2] = 0
    unit = unit_rms(gradient)
    torch.testing.assert_close(unit[:2].square().mean((1, 2, 3)), torch.ones(2), rtol=1e-3, atol=0)
    assert (unit[2] == 0).all()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are not interpreted here")
@pytest.mark.parametrize("own", [{"cutmix_every": 2, "guidance_repeats": 2}, {"gradient": "unet", "batch": 3}])
def test_trajectories_in_triton_are_those_in_torch(own):
    found, expected = (latents(pipeline(**own, sampler="ddpm", kernels=kernels)) for kernels in ("triton", "torch"))
    # float32: 1e-7 a launch, enlarged by the first step's 1/sqrt(abar) of 15, by CFG and by four guided steps
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("own", [{"cutmix_every": 1, "sampler": "ddpm"}, {"gradient": "unet"}, {"batch": 3}])
def test_the_loop_never_waits_for_the_gpu(own):
    pipe = pipeline(device="cuda", kernels="triton", **own)
    pack = pipe.pack(IDS, SEED)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pipe.latents(pack)
    finally:
        torch.cuda.set_sync_debug_mode("default")
