"""The sampling loop: against diffusers' pipeline, against naive loops, and independent of how a group is cut."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from dfkd.synthesis import cutmix, sampler
from dfkd.synthesis.guidance import Guidance, LossWeights
from dfkd.synthesis.sampler import SamplerSettings, sample_group, scaled
from dfkd.synthesis.schedule import build_table
from dfkd_engine.networks import Prior, load_prior
from dfkd_kernels.philox import philox_normal
from tests.synthesis.small_networks import CHANNELS, SCHEDULER, SIDE, SmallPrior, classifier, plain_bn_loss, plain_loss
from tests.synthesis.small_networks import bn_inputs as bn_inputs_of
from tests.synthesis.small_sd import make_small_sd

SEED, RHO, CFG, STEPS = 11, 0.15, 3.0, 4
IDS, LABELS = torch.arange(70, 77), torch.tensor([0, 1, 2, 0, 1, 2, 0])
PROMPTS = [f"a {label}" for label in LABELS.tolist()]
WEIGHTS = LossWeights(0.3, 0.7)


def sample(prior, guidance, settings, *, steps=STEPS, kind="ddim", ids=IDS, labels=LABELS, prompts=PROMPTS, micro=7):
    table = build_table(SCHEDULER, kind, steps)
    words, nothing = prior.encode_prompts(prompts), prior.encode_prompts([""])
    return sample_group(
        prior, guidance, table, settings, SEED, ids, labels, words, nothing, prior.latent_size, micro
    )  # fmt: skip


def guided(prior, teacher=None, weights=WEIGHTS):
    return Guidance(prior.decode, teacher or classifier(dtype=prior.dtype), weights)


@pytest.fixture
def doubled(monkeypatch):
    """The same noise in float64, so that naive loops can be met to its precision."""
    monkeypatch.setattr(sampler, "philox_normal", lambda *key: philox_normal(*key).double())


def naive(prior, teacher, path, norm, stats):
    """Guided DDIM written out: arXiv 2010.02502 eq. 12 at eta = 0, with autograd where the method has a gradient."""
    scheduler = DDIMScheduler(**SCHEDULER, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    abar = scheduler.alphas_cumprod.double()
    z = philox_normal(SEED, IDS, 0, (CHANNELS, SIDE, SIDE)).double()
    words, nothing = prior.encode_prompts(PROMPTS), prior.encode_prompts([""] * len(IDS))

    def gradient(of_latent, point):
        leaf = point.clone().requires_grad_()
        loss = plain_loss(prior, teacher, of_latent(leaf), LABELS, WEIGHTS.bn, WEIGHTS.cls, stats, "norm")
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
def test_both_paths_are_their_naive_loops(doubled, path, stats, norm):
    prior, teacher = SmallPrior(dtype=torch.float64), classifier(dtype=torch.float64)
    settings = SamplerSettings(gradient=path, guidance_step=RHO, guidance_norm=norm, cfg=CFG)
    got = sample(prior, guided(prior, teacher, replace(WEIGHTS, bn_stats=stats)), settings, micro=3)
    expected = naive(prior, teacher, path, norm, stats)
    # float64 throughout; 1e-12 under a root in L_bn and the rounding of four steps stay below this
    torch.testing.assert_close(got.latents, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(got.images, prior.decode(expected).float(), rtol=1e-6, atol=1e-6)


def test_the_paths_agree_where_the_network_ignores_its_input():
    """With eps constant in z, dz0hat/dz = 1/sqrt(abar): gradients of one direction, and of that ratio."""
    prior = SmallPrior(dtype=torch.float64, coupling=0.0)
    guidance, z = guided(prior), philox_normal(SEED, IDS, 0, (CHANNELS, SIDE, SIDE)).double()
    context, row = prior.encode_prompts(PROMPTS), build_table(SCHEDULER, "ddim", STEPS).row(1)
    t = torch.tensor(row.timestep)

    def clean(leaf, rows):
        return row.z0_z * leaf + row.z0_model * prior.denoise(leaf, t, context[rows])

    through, _ = guidance.gradient(z, LABELS, 7, clean)
    short, _ = guidance.gradient(clean(z, torch.arange(7)), LABELS, 7)
    torch.testing.assert_close(through, short / row.alpha, rtol=1e-9, atol=1e-9)


def test_the_paths_point_alike_where_it_does_not():
    prior = SmallPrior(dtype=torch.float64, coupling=0.3)
    guidance, z = guided(prior), philox_normal(SEED, IDS, 0, (CHANNELS, SIDE, SIDE)).double()
    context = prior.encode_prompts(PROMPTS)
    for row in map(build_table(SCHEDULER, "ddim", STEPS).row, range(STEPS)):
        t = torch.tensor(row.timestep)

        def clean(leaf, rows, row=row, t=t):
            return row.z0_z * leaf + row.z0_model * prior.denoise(leaf, t, context[rows])

        through, _ = guidance.gradient(z, LABELS, 7, clean)
        short, _ = guidance.gradient(clean(z, torch.arange(7)), LABELS, 7)
        assert (F.cosine_similarity(through.flatten(1), short.flatten(1)) > 0.5).all()


@pytest.fixture(scope="module")
def small_sd(tmp_path_factory):
    return make_small_sd(tmp_path_factory.mktemp("prior"))


@pytest.mark.parametrize("kind, scheduler", [("ddim", DDIMScheduler), ("dpmpp2m", DPMSolverMultistepScheduler)])
def test_unguided_sampling_is_diffusers_pipeline(small_sd, kind, scheduler, monkeypatch):
    pipeline = StableDiffusionPipeline.from_pretrained(small_sd, safety_checker=None)
    options = {"clip_sample": False} if kind == "ddim" else {}
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
    pipeline.set_progress_bar_config(disable=True)
    prior, ids = load_prior(small_sd), IDS[:3]
    prompts = ["a photo of 0", "a photo of 1", "an a"]
    along = []
    expected = pipeline(
        prompts,
        latents=philox_normal(SEED, ids, 0, (4, 8, 8)),
        num_inference_steps=STEPS,
        guidance_scale=CFG,
        output_type="pt",
        callback_on_step_end=lambda pipe, i, t, found: (along.append(found["latents"]), {})[1],
    ).images
    ours, denoise = [], Prior.denoise
    monkeypatch.setattr(Prior, "denoise", lambda self, z, t, c: (ours.append(z[:3]), denoise(self, z, t, c))[1])
    table = build_table(prior.scheduler_config, kind, STEPS)
    words, nothing = prior.encode_prompts(prompts), prior.encode_prompts([""])
    settings = SamplerSettings(cfg=CFG)
    got = sample_group(prior, None, table, settings, SEED, ids, LABELS[:3], words, nothing, (8, 8), 3)
    assert len(along) == len(ours) == STEPS
    for mine, theirs in zip([*ours[1:], got.latents], along, strict=True):
        # float32: theirs divides by sqrt(abar) and adds noise in turn, ours takes the step as one row; 1e-6 a step, and
        # the first step's 1/sqrt(abar) of 15 and CFG enlarge it
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("path, calls", [("latent", (1, 1, 1, 1)), ("unet", (1, 2, 2, 1))])
def test_guidance_interval(path, calls):
    prior = SmallPrior()
    settings = SamplerSettings(gradient=path, guide_from=0.25, guide_to=0.75)
    found = sample(prior, guided(prior), settings)
    times = build_table(SCHEDULER, "ddim", STEPS).timesteps.tolist()
    assert tuple(sum(t == time for _, t in prior.calls) for time in times) == calls
    assert {rows for rows, _ in prior.calls} == {14}  # both halves of classifier-free guidance
    assert {name: values.shape for name, values in found.curves.items()} == {"bn": (7, 2), "cls": (7, 2)}


def test_guidance_acts_only_inside_its_interval():
    prior = SmallPrior()
    free = sample(prior, None, SamplerSettings())
    never = sample(prior, guided(prior), SamplerSettings(guide_from=1.0))
    assert torch.equal(never.latents, free.latents) and not never.curves and not free.curves
    late = SmallPrior()
    sample(late, guided(late), SamplerSettings(guide_from=0.5))
    moved = [(a - b).abs().max() > 1e-3 for a, b in zip(late.seen, prior.seen[:STEPS], strict=True)]
    assert moved == [False, False, False, True]  # the third step is the first to be guided, the fourth sees it


@pytest.mark.parametrize(
    "settings, rows",
    [
        (SamplerSettings(cfg=2.0, cfg_from=0.25, cfg_to=0.75), [7, 14, 14, 7]),
        (SamplerSettings(cfg=1.0), [7, 7, 7, 7]),
        (SamplerSettings(cfg=0.0), [14, 14, 14, 14]),
    ],
)
def test_classifier_free_interval(settings, rows):
    prior = SmallPrior()
    sample(prior, None, settings)
    assert [count for count, _ in prior.calls] == rows


def test_cfg_scales_name_their_ends():
    """w = 1 is the prompt alone, w = 0 the negative prompt alone."""
    prior = SmallPrior()
    whole = sample(prior, None, SamplerSettings(cfg=1.0))
    none = sample(prior, None, SamplerSettings(cfg=0.0))
    unprompted = sample(prior, None, SamplerSettings(cfg=1.0), prompts=[""] * 7)
    torch.testing.assert_close(none.latents, unprompted.latents, rtol=1e-5, atol=1e-5)
    assert (whole.latents - none.latents).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["ddim", "dpmpp2m"])
def test_latent_cutmix_pastes_after_its_steps(kind):
    prior, mixed = SmallPrior(), SmallPrior()
    without = sample(prior, None, SamplerSettings(), kind=kind)
    found = sample(mixed, None, SamplerSettings(cutmix_every=2), kind=kind)
    plan = cutmix.plan(SEED, IDS, LABELS, 1, 1.0, SIDE, SIDE)  # the only event: none follows the last step
    assert torch.equal(found.plan.box, plan.box) and torch.equal(found.plan.partner, plan.partner)
    assert without.plan is None and (plan.box[:, 2:] > plan.box[:, :2]).all(1).any()
    assert torch.equal(mixed.seen[1], prior.seen[1])
    assert torch.equal(mixed.seen[2][:7], cutmix.apply(prior.seen[2][:7], plan))
    assert (found.latents - without.latents).abs().max() > 0.01


def test_the_second_order_step_is_mixed_too(doubled):
    """Two images that swap everything go on along each other's path, the previous clean estimate included."""
    prior = SmallPrior(dtype=torch.float64)
    ids, labels = torch.tensor([5, 6]), torch.tensor([0, 0])
    whole = cutmix.CutMixPlan(torch.tensor([1, 0]), torch.tensor([[0, 0, SIDE, SIDE]] * 2), torch.zeros(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutmix, "plan", lambda *_: whole)
        mixed = sample(
            prior, None, SamplerSettings(cutmix_every=2), kind="dpmpp2m", ids=ids, labels=labels, prompts=["a"] * 2
        )
    plain = sample(prior, None, SamplerSettings(), kind="dpmpp2m", ids=ids, labels=labels, prompts=["a"] * 2)
    torch.testing.assert_close(mixed.latents, plain.latents.flip(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", ["latent", "unet"])
def test_noise_editing_lowers_the_bn_loss_of_the_start(doubled, path):
    prior, teacher = SmallPrior(dtype=torch.float64), classifier(dtype=torch.float64)
    row = build_table(SCHEDULER, "ddim", STEPS).row(0)
    context = prior.encode_prompts(PROMPTS)

    def start_loss(steps):
        prior.seen.clear()
        settings = SamplerSettings(
            gradient=path, guide_from=1.0, cfg=1.0, noise_edit_steps=steps, noise_edit_scale=0.01
        )
        sample(prior, guided(prior, teacher), settings)
        z = prior.seen[-STEPS]
        z0 = row.z0_z * z + row.z0_model * prior.denoise(z, torch.tensor(row.timestep), context)
        return z, plain_bn_loss(bn_inputs_of(teacher, prior.decode(z0))[1], "norm")

    (plain, before), (edited, after) = start_loss(0), start_loss(10)
    assert torch.equal(plain, philox_normal(SEED, IDS, 0, (CHANNELS, SIDE, SIDE)).double())
    assert not torch.equal(edited, plain) and after < before


EVERYTHING = SamplerSettings(cutmix_every=2, noise_edit_steps=2, guidance_step=0.1)


@pytest.mark.parametrize("path", ["latent", "unet"])
@pytest.mark.parametrize("stats", ["image", "group"])
def test_an_image_does_not_depend_on_its_batch(path, stats):
    prior, settings = SmallPrior(), replace(EVERYTHING, gradient=path)
    guidance = guided(prior, weights=replace(WEIGHTS, bn_stats=stats))
    whole = sample(prior, guidance, settings, kind="ddpm")
    for micro in (1, 3, 7, 100):
        again = sample(prior, guidance, settings, kind="ddpm", micro=micro)
        # float32 kernels choose their order of summation by shape: 1e-7 a call, enlarged by four guided steps
        torch.testing.assert_close(again.latents, whole.latents, rtol=1e-4, atol=1e-4)
        for name, curve in whole.curves.items():
            torch.testing.assert_close(again.curves[name], curve, rtol=1e-4, atol=1e-4)
    for micro in (3, 7):
        first, second = (sample(prior, guidance, settings, kind="ddpm", micro=micro) for _ in range(2))
        assert torch.equal(first.latents, second.latents) and torch.equal(first.images, second.images)


def test_an_image_does_not_depend_on_the_order_of_its_group():
    prior, order = SmallPrior(), torch.tensor([4, 2, 6, 0, 5, 1, 3])
    guidance = guided(prior)
    first = sample(prior, guidance, EVERYTHING, kind="ddpm")
    prompts = [PROMPTS[i] for i in order.tolist()]
    moved = sample(
        prior, guidance, EVERYTHING, kind="ddpm", ids=IDS[order], labels=LABELS[order], prompts=prompts, micro=3
    )
    torch.testing.assert_close(moved.latents, first.latents[order], rtol=1e-4, atol=1e-4)
    assert torch.equal(IDS[order][moved.plan.partner], IDS[first.plan.partner][order])


def test_without_interaction_an_image_does_not_depend_on_its_group():
    prior, settings = SmallPrior(), SamplerSettings(guidance_step=0.1)
    guidance = guided(prior, weights=replace(WEIGHTS, bn_stats="image"))
    whole = sample(prior, guidance, settings, kind="ddpm")
    part = sample(prior, guidance, settings, kind="ddpm", ids=IDS[2:4], labels=LABELS[2:4], prompts=PROMPTS[2:4])
    torch.testing.assert_close(part.latents, whole.latents[2:4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e-38])
def test_unit_gradients(size):
    """Also where squares underflow float32; zero stays zero."""
    gradient = size * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    gradient[2] = 0
    unit = scaled(gradient, "rms")
    torch.testing.assert_close(unit[:2].square().mean((1, 2, 3)), torch.ones(2), rtol=1e-3, atol=0)
    assert (unit[2] == 0).all() and scaled(gradient, "none") is gradient


def test_images_that_are_not_finite_are_named():
    prior = SmallPrior()
    guidance = guided(prior)
    decode = prior.decode
    prior.decode = lambda z0: torch.where(torch.arange(len(z0))[:, None, None, None] == 2, torch.nan, decode(z0))
    with pytest.raises(FloatingPointError, match=r"the images \[72\] are not finite"):
        sample(prior, guidance, SamplerSettings())


@pytest.mark.parametrize("path", ["latent", "unet"])
def test_repeats_are_guidance_steps_at_one_noise_level(doubled, path):
    prior = SmallPrior(dtype=torch.float64)
    guidance, seen = guided(prior), []
    plain = guidance.gradient
    guidance.gradient = lambda *given: seen.append(given[0]) or plain(*given)
    once = SamplerSettings(gradient=path, guidance_step=RHO, cfg=CFG, guide_to=0.2)
    sample(prior, guidance, replace(once, guidance_repeats=3))
    assert len(seen) == 3
    for before, after in pairwise(seen):
        rms = (after - before).square().mean((1, 2, 3)).sqrt()
        torch.testing.assert_close(rms, torch.full_like(rms, RHO))  # each moves every image by rho


def test_refinement_lowers_the_loss_of_the_finished_images():
    prior = SmallPrior()
    guidance, settings = guided(prior), SamplerSettings(cfg=CFG)
    on_pixels = Guidance(lambda x: x, guidance.teacher, guidance.weights)

    def loss(images):
        _, losses = on_pixels.gradient(images, LABELS, len(LABELS))
        return sum(getattr(WEIGHTS, name) * value.sum() for name, value in losses.items())

    rough = sample(prior, guidance, settings).images
    fine = sample(prior, guidance, replace(settings, refine_steps=8, refine_step=0.01)).images
    assert loss(fine) < loss(rough) and fine.min() >= 0 and fine.max() <= 1
    cut = sample(prior, guidance, replace(settings, refine_steps=8, refine_step=0.01), micro=3).images
    torch.testing.assert_close(cut, fine, rtol=0, atol=1e-4)  # eight float32 steps
