"""Guidance inside diffusers' pipelines: they draw what our sampler draws, and a guided scheduler is one of theirs."""

import copy
import dataclasses
import inspect
import json
from contextlib import nullcontext
from itertools import product

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, DiTPipeline, StableDiffusionImg2ImgPipeline
from PIL import Image

import dfkd
from dfkd.config import GenerateConfig, ViewConfig
from dfkd.errors import UsageError
from dfkd.synthesis import pack as pack_module
from dfkd.synthesis.diffusers_levels import KNOWN, level_of
from dfkd.synthesis.losses import CrossEntropy
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd_engine.errors import EngineError
from dfkd_engine.priors.prior import Prior
from dfkd_kernels.philox import philox_normal
from tests.synthesis.small_networks import classifier
from tests.tiny_priors import SIDE, SIZE, _module, drawing

SEED, IDS, NAMES = 5, torch.arange(3), ("zero", "one", "two")
DIT = [0, 1, 2]  # ids of classes with NAMES among their words
GUIDED = {"step": 0.3, "bn_weight": 0.2, "repeats": 2, "start": 0.2, "stop": 0.9}
FLAT = {"guidance_step": 0.3, "bn_weight": 0.2, "guidance_repeats": 2, "guide_from": 0.2, "guide_to": 0.9}
CASES = [  # prior, diffusers' scheduler, our sampler, steps, cfg
    ("sd1", "DDIMScheduler", "ddim", 4, 3.0),
    ("sd1", "EulerDiscreteScheduler", "euler", 4, 3.0),
    ("sd1", "DPMSolverMultistepScheduler", "dpmpp2m", 5, 3.0),
    ("sd1", "DDPMScheduler", "ddpm", 4, 1.0),
    ("sd2", "DDIMScheduler", "ddim", 4, 3.0),
    ("sd2", "EulerDiscreteScheduler", "euler", 4, 1.0),
    ("sd2", "DPMSolverMultistepScheduler", "dpmpp2m", 5, 3.0),
    ("sdxl", "DDIMScheduler", "ddim", 4, 3.0),
    ("sdxl", "EulerDiscreteScheduler", "euler", 4, 3.0),
    ("sdxl", "DPMSolverMultistepScheduler", "dpmpp2m", 5, 1.0),
    ("sdxl-turbo", "EulerAncestralDiscreteScheduler", "euler-ancestral", 4, 1.0),
    ("lcm", "LCMScheduler", "lcm", 4, 8.0),
    ("sd3", "FlowMatchEulerDiscreteScheduler", "euler", 4, 3.0),
    ("dit", "DDIMScheduler", "ddim", 4, 4.0),
    ("pixels", "DDIMScheduler", "ddim", 4, 1.0),
    ("pixels", "DDPMScheduler", "ddpm", 4, 1.0),
    ("pixels", "LCMScheduler", "lcm", 4, 1.0),
]


@pytest.fixture(autouse=True)
def double_noise(monkeypatch):
    """The noise of float32 in float64, so that nothing else is narrower."""
    draw = pack_module.philox_normal
    monkeypatch.setattr(pack_module, "philox_normal", lambda *key: draw(*key).double())


def theirs(folder, scheduler=None, kind=DiffusionPipeline, dtype=torch.float64, **options):
    index = json.loads((folder / "model_index.json").read_text())
    absent = {part: None for part, value in index.items() if value == [None, None]}
    pipe = kind.from_pretrained(folder, torch_dtype=dtype, **absent)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        own = getattr(diffusers, scheduler)
        latent = scheduler in ("DDIMScheduler", "DDPMScheduler") and hasattr(pipe, "vae")
        clip = {"clip_sample": False} if latent else {}  # which both do by default
        pipe.scheduler = own.from_config(pipe.scheduler.config, **clip, **options)
    return pipe


def guidance_of(pipe, dtype=torch.float64, **settings):
    guidance = dfkd.TeacherGuidance(classifier(size=SIDE), getattr(pipe, "vae", None), **{**GUIDED, **settings})
    guidance.teacher.module.to(dtype)
    return guidance.for_labels(NAMES)


def noise_of(steps, shape):
    return [philox_normal(SEED, IDS, stream, shape).double() for stream in range(1 + steps)]


def call(pipe, steps, cfg, prompts=NAMES, **options):
    """Images [3, 3, H, W] in 0..1 of `pipe`, from the noise that our sampler starts from."""
    pixels = not hasattr(pipe, "vae")
    first, *between = noise_of(steps, (3, SIDE, SIDE) if pixels else (4, SIZE, SIZE))
    arrays = isinstance(pipe, DDPMPipeline | DiTPipeline)
    common = {"num_inference_steps": steps, "output_type": "np" if arrays else "pt", **options}
    module = _module(type(pipe.scheduler))
    with drawing(module, between) if hasattr(module, "randn_tensor") else nullcontext():
        if arrays:  # which take no noise
            with drawing(_module(type(pipe)), [first]):
                which = {"batch_size": 3} if pixels else {"class_labels": DIT, "guidance_scale": cfg}
                return torch.as_tensor(pipe(**which, **common).images).movedim(-1, 1)
        texts = [f"a photo of a {name}" for name in prompts]
        return pipe(texts, latents=first, guidance_scale=cfg, **common).images


@pytest.mark.parametrize("name, scheduler, sampler, steps, cfg", CASES)
def test_it_draws_what_our_sampler_draws(name, scheduler, sampler, steps, cfg, tiny_prior):
    folder, own = (
        tiny_prior(name),
        {} if name == "pixels" else {"cfg": cfg, "prompt": "{label}" if name == "dit" else "a photo of a {label}"},
    )
    config = GenerateConfig.of(
        device="cpu", backend="eager", kernels="torch", sampler=sampler, steps=steps, group=3, **own, **FLAT
    )
    ours = GuidedPipeline(Prior.from_pretrained(folder), classifier(size=SIDE), config)
    for network in (*ours.prior.networks.values(), ours.teacher.module):
        network.double()
    pack = ours.pack(IDS, SEED)
    expected = ours.decode(ours.latents(pack))
    pipe = theirs(folder, scheduler)
    plain = call(pipe, steps, cfg)
    guidance = guidance_of(pipe)
    pipe.scheduler = dfkd.guided(pipe.scheduler, guidance)
    if name == "dit":
        guidance.for_labels([*NAMES, *NAMES])  # it holds both rows of classifier-free guidance
    found = call(pipe, steps, cfg).double()
    assert (found - plain).abs().max() > 0.01
    # float64; diffusers holds its levels in float32, 1e-7 of each, which guidance of unit length carries on. Euler
    # casts its latents to float32 too, and from a terminal SNR of zero (sd2) they are 4096 times as large as z.
    atol = 2e-3 if (name, sampler) == ("sd2", "euler") else 2e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    assert guidance.record.keys() == pack.losses.keys()
    for i, losses in guidance.record.items():
        once = {key: values[:3] for key, values in losses.items()}
        torch.testing.assert_close(once, pack.losses[i], rtol=0, atol=10 * atol)


def test_the_shift_that_follows_the_image_is_the_pipelines(tiny_prior):
    """Stable Diffusion 3's pipeline computes mu from its latents' patches, and so does ours."""
    folder = tiny_prior("sd3")
    shifted = {"use_dynamic_shifting": True, "max_shift": 3.0, "base_image_seq_len": 4}
    prior = Prior.from_pretrained(folder)
    settings = {"sampler": "euler", "steps": 4, "cfg": 1.0, "prompt": "a photo of a {label}", "guidance_step": 0.0}
    config = GenerateConfig.of(device="cpu", backend="eager", kernels="torch", **settings)
    ours = GuidedPipeline(
        dataclasses.replace(prior, scheduler_config={**prior.scheduler_config, **shifted}),
        classifier(size=SIDE),
        config,
    )
    for network in ours.prior.networks.values():
        network.double()
    expected = ours.decode(ours.latents(ours.pack(IDS, SEED)))
    pipe = theirs(folder, "FlowMatchEulerDiscreteScheduler", **shifted)
    torch.testing.assert_close(call(pipe, 4, 1.0), expected, rtol=0, atol=1e-5)  # levels in float32
    plain = theirs(folder, "FlowMatchEulerDiscreteScheduler")
    assert (call(plain, 4, 1.0) - expected).abs().max() > 1e-3


def own_scheduler(name, **config):
    made = getattr(diffusers, name)
    given = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    given |= {"solver_order": 1} if "Singlestep" in name else {}
    known = inspect.signature(made.__init__).parameters
    return made(**{key: value for key, value in (given | {"skip_prk_steps": True} | config).items() if key in known})


@pytest.mark.parametrize("name", KNOWN)
def test_levels_are_those_that_the_scheduler_noises_to(name):
    scheduler = own_scheduler(name)
    scheduler.set_timesteps(6)
    z0, eps = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = scheduler.timesteps[2]
    noised = (getattr(scheduler, "scale_noise", None) or scheduler.add_noise)(*(
        (z0, t[None], eps) if hasattr(scheduler, "scale_noise") else (z0, eps, t[None])
    ))  # fmt: skip
    for at in range(2):
        scheduler.scale_model_input(z0, scheduler.timesteps[at]) if hasattr(scheduler, "scale_model_input") else None
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = 2
    level = level_of(scheduler, t)
    # float32: the precision of their tables of levels, which reach 15 where the latents are scaled by them
    torch.testing.assert_close(level.A * z0 + level.S * eps, noised, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "name, prediction",
    [
        *product(["DDIMScheduler", "EulerDiscreteScheduler"], ["epsilon", "v_prediction", "sample"]),
        ("FlowMatchEulerDiscreteScheduler", "flow"),
    ],
)
def test_a_moved_estimate_holds_eps(name, prediction):
    scheduler = own_scheduler(name, prediction_type=prediction)
    scheduler.set_timesteps(6)
    level = level_of(scheduler, scheduler.timesteps[0])
    x, m, d = torch.randn(3, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean, (x2, m2) = level.clean(x, m), level.moved(x, m, d)
    torch.testing.assert_close(level.clean(x2, m2), clean + d)
    torch.testing.assert_close(x2 - level.A * (clean + d), x - level.A * clean)  # S eps
    torch.testing.assert_close(level.output_of(x, clean), m)


@pytest.mark.parametrize("name", KNOWN)
def test_a_guided_scheduler_is_one_of_theirs(name, tmp_path):
    plain = own_scheduler(name)
    guidance = dfkd.TeacherGuidance(classifier(size=SIDE), None).for_labels([0])
    guided = dfkd.guided(plain, guidance)
    assert isinstance(guided, type(plain)) and type(guided) is not type(plain)
    assert type(guided).__name__ == name and guided.config == plain.config and guided.config is not None
    for method in ("step", "set_timesteps"):
        assert inspect.signature(getattr(guided, method)) == inspect.signature(getattr(plain, method))
    for scheduler in (plain, guided):
        scheduler.set_timesteps(5)
    assert torch.equal(guided.timesteps, plain.timesteps) and guided.order == plain.order
    assert getattr(guided, "init_noise_sigma", 1) == getattr(plain, "init_noise_sigma", 1)
    assert {kind.__name__ for kind in guided.compatibles} == {kind.__name__ for kind in plain.compatibles}
    assert copy.deepcopy(guided).config == plain.config and not hasattr(plain, "_unguided")
    guided.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    assert (
        type(loaded) is type(plain)
        and json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == name
    )
    assert type(type(plain).from_config(guided.config)) is type(plain)
    assert hasattr(type(guided).from_config(guided.config), "_unguided")
    again = dfkd.guided(guided, guidance)  # in its place, not around it
    assert type(again).__mro__[1] is type(plain)


def test_a_pipeline_with_it_is_saved_as_a_plain_one(tiny_prior, tmp_path):
    pipe = theirs(tiny_prior("sd1"), dtype=torch.float32)
    pipe.scheduler = dfkd.guided(pipe.scheduler, guidance_of(pipe, torch.float32))
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "PNDMScheduler"]
    assert type(DiffusionPipeline.from_pretrained(tmp_path).scheduler) is diffusers.PNDMScheduler


ALL = ["PNDMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
       "LMSDiscreteScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "DPMSolverSinglestepScheduler",
       "TCDScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler"]  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_every_other_scheduler_is_guided_to_the_label(name, tiny_prior):
    own = {"clip_sample": False} if "DD" in name else {"solver_order": 1} if "Singlestep" in name else {}
    pipe = theirs(tiny_prior("sd1"), name, dtype=torch.float32, **own)
    guidance = guidance_of(pipe, torch.float32, bn_weight=0.0, step=0.5, start=0.0, stop=1.0)

    def loss():
        images = pipe([f"a {n}" for n in NAMES], num_inference_steps=6, output_type="pt",
                      generator=torch.Generator().manual_seed(0)).images  # fmt: skip
        assert images.isfinite().all()
        return float(torch.nn.functional.cross_entropy(guidance.teacher(images), IDS))

    before = loss()
    pipe.scheduler = dfkd.guided(pipe.scheduler, guidance)
    assert loss() < before - 0.02  # from ln 3, of a teacher that was not trained; it falls by 0.03 to 0.1


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "DDIMParallelScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
     "LMSDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler",
     "UniPCMultistepScheduler"],
)  # fmt: skip
@pytest.mark.parametrize("at", range(1, 7))
def test_the_next_sample_holds_the_push(name, at):
    """Of a network whose clean estimate is the same at every step. DPM-Solver's second order adds to it; of all that
    start from the sample they are given UniPC alone takes something back."""

    class Once:
        size = 0.1

        def push(self, clean, place, steps, clip, share):
            return torch.full_like(clean, self.size) if place == at else None

    def sample_behind(size):
        once = Once()
        once.size = size
        scheduler = dfkd.guided(own_scheduler(name), once)
        scheduler.set_timesteps(8)
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        for t in scheduler.timesteps[: at + 1]:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(level_of(scheduler, t).output_of(x, torch.full_like(x, 0.3)), t, x).prev_sample
        return x, level_of(scheduler, scheduler.timesteps[at + 1]).A

    moved, A = sample_behind(0.1)
    share = float((moved - sample_behind(0.0)[0]) / (0.1 * A))
    if name == "UniPCMultistepScheduler":
        assert 0.5 < share < 0.9
    else:  # their levels are float32
        assert 1 - 1e-3 < share < (1.4 if name == "DPMSolverMultistepScheduler" else 1 + 1e-3)


def test_guidance_that_does_not_act_changes_no_bit(tiny_prior):
    pipe = theirs(tiny_prior("sd1"), "EulerDiscreteScheduler")
    guidance_of(pipe)  # which freezes the VAE: its kernels may be others then, in the last bit
    plain = call(pipe, 4, 3.0)
    for off in ({"stop": 0.0, "start": 0.0}, {"step": 0.0}):
        pipe.scheduler = dfkd.guided(pipe.scheduler, guidance_of(pipe, **off))
        assert torch.equal(call(pipe, 4, 3.0), plain)


def test_in_inference_mode(tiny_prior):
    pipe = theirs(tiny_prior("sd1"), "DDIMScheduler")
    pipe.scheduler = dfkd.guided(pipe.scheduler, guidance_of(pipe))
    expected = call(pipe, 4, 3.0)
    with torch.inference_mode():
        assert torch.equal(call(pipe, 4, 3.0), expected)


def drawings():
    pixels = np.random.default_rng(0).integers(0, 255, (3, SIDE, SIDE, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_image_to_image(scheduler, tiny_prior):
    """From the step where strength begins; generators belong to images, whose guidance does not depend on the batch."""
    pipe = theirs(tiny_prior("sd1"), scheduler, StableDiffusionImg2ImgPipeline)
    guidance = guidance_of(pipe, bn_stats="image", start=0.0, stop=1.0)

    def draw(rows):
        return pipe(
            prompt=[f"a {NAMES[i]}" for i in rows], image=[drawings()[i] for i in rows], strength=0.5, output_type="pt",
            num_inference_steps=8, generator=[torch.Generator().manual_seed(i) for i in rows],
        ).images  # fmt: skip

    plain = draw([0, 1, 2])
    pipe.scheduler = dfkd.guided(pipe.scheduler, guidance)
    together = draw([0, 1, 2])
    assert list(guidance.record) == [4, 5, 6, 7]
    judge = lambda images: torch.nn.functional.cross_entropy(guidance.teacher(images.double()), IDS)  # noqa: E731
    assert judge(together) < judge(plain)
    guidance.for_labels([2])
    # float64; the VAE's encoder and the text encoder run in batches of other sizes
    torch.testing.assert_close(draw([2])[0], together[2], rtol=0, atol=1e-6)


def test_labels_are_those_of_images_in_the_pipelines_order(tiny_prior):
    pipe = theirs(tiny_prior("sd1"), "DDIMScheduler")
    guidance = guidance_of(pipe)
    pipe.scheduler = dfkd.guided(pipe.scheduler, guidance)

    def draw(labels):
        guidance.for_labels(labels)
        return pipe(["a zero", "a one"], num_inference_steps=3, num_images_per_prompt=2, output_type="pt",
                    generator=torch.Generator().manual_seed(0)).images  # fmt: skip

    mixed = draw(["zero", "zero", "one", 1])
    assert torch.equal(mixed, draw([0, 0, 1, 1])) and not torch.equal(mixed, draw([0, 1, 0, 1]))
    with pytest.raises(UsageError, match="2 labels for 4 rows of latents"):
        draw([0, 1])
    guidance.for_labels([1, 1, 1])
    assert isinstance(pipe("a one", num_inference_steps=2, num_images_per_prompt=3).images[0], Image.Image)


@pytest.mark.parametrize(
    "name, scheduler, cfg",
    [
        ("sd1", "DDIMScheduler", 3.0),
        ("sd1", "EulerDiscreteScheduler", 3.0),
        ("sdxl", "EulerDiscreteScheduler", 3.0),
        ("sd3", "FlowMatchEulerDiscreteScheduler", 1.0),
    ],
)
def test_the_callback_is_the_guided_scheduler_from_the_second_step_on(name, scheduler, cfg, tiny_prior):
    pipe = theirs(tiny_prior(name), scheduler)
    guidance = guidance_of(pipe, start=0.25, stop=1.0)
    plain = call(pipe, 4, cfg)
    behind = call(pipe, 4, cfg, callback_on_step_end=guidance.callback())
    assert guidance.record.keys() == {1, 2, 3} and (behind - plain).abs().max() > 0.01
    pipe.scheduler = dfkd.guided(pipe.scheduler, guidance)
    # float64; the estimate comes from a difference of samples, 1e-7 of levels in float32 times ten
    torch.testing.assert_close(call(pipe, 4, cfg), behind, rtol=0, atol=2e-4)
    with pytest.raises(UsageError, match="both would guide"):
        call(pipe, 4, cfg, callback_on_step_end=guidance.callback())


def test_the_callback_leaves_out_the_first_step_alone(tiny_prior):
    pipe = theirs(tiny_prior("sd1"), "DDIMScheduler")
    guidance = guidance_of(pipe, start=0.0, stop=1.0)
    callback = guidance.callback()
    first = call(pipe, 4, 3.0, callback_on_step_end=callback)
    assert guidance.record.keys() == {1, 2, 3}
    assert torch.equal(call(pipe, 4, 3.0, callback_on_step_end=callback), first)  # another call begins anew


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler"])
def test_the_callback_refuses_what_hides_the_estimate(name, tiny_prior):
    pipe = theirs(tiny_prior("sd1"), name)
    with pytest.raises(UsageError, match=f"the callback with {name}: .*use pipe.scheduler = dfkd.guided"):
        call(pipe, 4, 3.0, callback_on_step_end=guidance_of(pipe).callback())


def test_lower_precision_keeps_the_pipelines_dtype(tiny_prior):
    pipe = theirs(tiny_prior("sd1"), "DDIMScheduler", dtype=torch.bfloat16)
    guidance = guidance_of(pipe, torch.float32)
    pipe.scheduler = dfkd.guided(pipe.scheduler, guidance)
    latents = pipe([f"a {n}" for n in NAMES], num_inference_steps=3, output_type="latent").images
    assert latents.dtype == torch.bfloat16 and latents.isfinite().all()
    pipe.vae.half()
    images = guidance.decode(latents.float())
    wide = copy.deepcopy(pipe.vae).float().decode(latents.float() / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(images, (wide / 2 + 0.5).clamp(0, 1))  # in float32, for its force_upcast
    assert pipe.vae.dtype == torch.float16


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda t, vae: dfkd.TeacherGuidance(t, vae, gradient="unet"), "gradient = 'unet': it acts outside the steps"),
        (lambda t, vae: dfkd.TeacherGuidance(t, vae, refine_steps=2), "refine_steps = 2"),
        (lambda t, vae: dfkd.TeacherGuidance(t, vae, reencode=1), "reencode = 1: it acts outside the steps"),
        (lambda t, vae: dfkd.TeacherGuidance(t, vae, bn_weight=0, cls_weight=0), "no guidance loss"),
        (lambda t, vae: dfkd.TeacherGuidance(t, vae, adv_weight=1), "the adversarial loss has no student"),
        (lambda t, vae: dfkd.TeacherGuidance(t, vae).for_labels(["zer"]), "no class 'zer': did you mean zero"),
        (lambda t, vae: dfkd.TeacherGuidance(t, vae).for_labels([3]), "no class 3: the teacher has 3"),
        (
            lambda t, vae: dfkd.guided(diffusers.EDMEulerScheduler(), dfkd.TeacherGuidance(t, vae)),
            "scheduler EDMEulerScheduler: its levels are unknown",
        ),
        (
            lambda t, vae: dfkd.guided(
                diffusers.PNDMScheduler(prediction_type="v_prediction", skip_prk_steps=True),
                dfkd.TeacherGuidance(t, vae),
            ),
            "PNDMScheduler with prediction_type v_prediction",
        ),
        (
            lambda t, vae: dfkd.guided(diffusers.DPMSolverSinglestepScheduler(), dfkd.TeacherGuidance(t, vae)),
            "DPMSolverSinglestepScheduler with solver_order 2",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(UsageError) as caught:
        make(classifier(size=SIDE), None)
    assert message in str(caught.value)


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="TeacherGuidance has no setting 'stepp': did you mean step"):
        dfkd.TeacherGuidance(classifier(size=SIDE), None, stepp=1)


def test_losses_of_the_users_own_guide_as_well():
    guidance = dfkd.TeacherGuidance(classifier(size=SIDE), None, cls_weight=0, bn_weight=0, losses=[CrossEntropy(2.0)])
    push = guidance.for_labels([0, 1]).push(torch.zeros(2, 3, SIDE, SIDE), 0, 4)
    assert push.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-4) and guidance.record[0].keys() == {"cls"}


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sdxl with mean and std", "sd3"])
def test_it_decodes_as_the_pipeline_does(name, tiny_prior):
    pipe, last = theirs(tiny_prior(name.partition(" ")[0])), {}
    if "mean" in name:
        pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 0.6, 0.7, 0.8])

    def keep(pipe, i, t, tensors):
        last.update(tensors)
        return {}

    expected = pipe(["a", "b"], num_inference_steps=2, output_type="pt", callback_on_step_end=keep).images
    found = dfkd.TeacherGuidance(classifier(size=SIDE), pipe.vae).decode(last["latents"])
    torch.testing.assert_close(found, expected.to(found), rtol=0, atol=1e-6)  # SDXL decodes in float32


def drawn(steps, scheduler, guidance, tiny_prior):
    """The images of a guided diffusers pipeline, from noise of its own."""
    pipe = theirs(tiny_prior("sd1"), scheduler)
    pipe.scheduler = dfkd.guided(pipe.scheduler, guidance)
    options = {"num_inference_steps": steps, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return pipe([f"a {name}" for name in NAMES], **options).images


@pytest.mark.parametrize("settings", [{"power": 2.0}, {"view": ViewConfig(shift=2)}, {"tv_weight": 3.0}])
def test_settings_of_guidance_act_in_a_pipeline(settings, tiny_prior):
    pipe = theirs(tiny_prior("sd1"))
    draws = [drawn(4, "DDIMScheduler", guidance_of(pipe, **own), tiny_prior) for own in ({}, settings, settings)]
    assert not torch.equal(draws[0], draws[1]) and torch.equal(draws[1], draws[2])


@pytest.mark.parametrize(
    "name, scheduler, sampler",
    [
        ("sd1", "DDIMScheduler", "ddim"),
        ("sd1", "EulerDiscreteScheduler", "euler"),
        ("sd3", "FlowMatchEulerDiscreteScheduler", "euler"),
    ],
)
def test_the_share_of_noise_is_our_samplers(name, scheduler, sampler, tiny_prior):
    pipe = theirs(tiny_prior(name), scheduler)
    guidance, shares = guidance_of(pipe, power=1.0), []
    guidance.push = lambda clean, i, steps, clip=None, noise=1.0: shares.append(noise)
    pipe.scheduler = dfkd.guided(pipe.scheduler, guidance)
    pipe([f"a {label}" for label in NAMES], num_inference_steps=4, output_type="pt")
    ours = GuidedPipeline(Prior.from_pretrained(tiny_prior(name)), classifier(size=SIDE),
                          GenerateConfig.of(sampler=sampler, steps=4, device="cpu", backend="eager"))  # fmt: skip
    torch.testing.assert_close(shares, ours.table.sigma.tolist(), rtol=1e-6, atol=1e-6)


def test_softplus_of_a_teacher_without_relu_is_refused_in_a_pipeline(tiny_prior):
    with pytest.raises(UsageError, match="--softplus-beta 3 with the teacher small: it has no ReLU"):
        guidance_of(theirs(tiny_prior("sd1")), softplus_beta=3.0)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "pixels"])
def test_a_prior_encodes_as_it_decodes(name, tiny_prior):
    """The mean of the encoder's answer, shifted and scaled as denoisers take it; pixels as they are."""
    prior = Prior.from_pretrained(tiny_prior(name), torch.float64)
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = prior.encode(images)
    if name == "pixels":
        assert torch.allclose(prior.decode(found), images, rtol=0, atol=1e-12)
        return
    vae = theirs(tiny_prior(name)).vae
    mean = vae.encode(2 * images - 1).latent_dist.mean
    want = (mean - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    prior.vae.encoder = torch.nn.Identity()
    with pytest.raises(EngineError, match="it has no encoder"):
        prior.encode(images)
