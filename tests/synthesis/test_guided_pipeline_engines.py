"""Guidance of a GuidedPipeline inside diffusers' pipelines: its engines compute the gradient, and images stay so."""

from collections import Counter

import pytest
import torch
from diffusers import AutoencoderTiny

import dfkd
from dfkd.compiled.engines import build
from dfkd.errors import UsageError
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd_engine.backends import BACKENDS
from dfkd_engine.compiled import Engine
from dfkd_engine.priors.prior import Prior
from dfkd_engine.store import EngineStore
from tests.cli.test_generate_engines import UNET, VAE
from tests.compiled.small_functions import BACKEND, NEEDS_IT, Unchanged, milliseconds, set_facts
from tests.synthesis.small_networks import classifier
from tests.synthesis.test_guided_pipelines import NAMES, theirs
from tests.tiny_sd import TINY_VAE, make_tiny_sd

SIDE = 8  # of the images; their latents are [B, 4, 4, 4]
STEPS, GUIDED_STEPS, REPEATS = 4, 3, 2  # guide_from leaves out the first step
FLAT = {"guidance_step": 0.3, "bn_weight": 0.2, "guidance_repeats": REPEATS, "guide_from": 0.2, "group": 3, "steps": 2}
SPLIT = {"decode", "image_moments", "image_gradient", "decode_vjp"}


def ours(folder, student=None, **settings):
    """A GuidedPipeline on the CPU. Its sampler and steps are others than those of the diffusers pipeline."""
    config = dfkd.GenerateConfig.of(**{"device": "cpu", "kernels": "torch", "backend": "eager", **FLAT, **settings})
    return GuidedPipeline(Prior.from_pretrained(folder), classifier(size=SIDE), config, student)


def with_engines(folder, root, names, student=None, **settings):
    """The same with engines of these functions, which were measured quicker than eager."""
    store, pipe = EngineStore(root), ours(folder, student, backend="auto", engines=root, **settings)
    for function in pipe.functions():
        if function.name in names:
            _, manifest = build(function, BACKEND, store)
            set_facts(store, manifest.key, milliseconds=milliseconds(1.0, 2.0))
    return pipe


def draw(folder, guidance, labels=NAMES, dtype=torch.float32, **options):
    """Images [B, 3, H, W] in 0..1 of diffusers' own pipeline, guided unless guidance is None."""
    pipe = theirs(folder, "DDIMScheduler", dtype=dtype)
    if guidance is not None:
        pipe.scheduler = dfkd.guided(pipe.scheduler, guidance.for_labels(labels))
    given = {"num_inference_steps": STEPS, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return pipe([f"a {name}" for name in labels], **(given | options)).images.float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a pipeline whose decoder compiles in a second, and in `decoder` another for guidance."""
    text = {"num_hidden_layers": 1}
    folder = tmp_path_factory.mktemp("prior")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        AutoencoderTiny(**{**TINY_VAE, **VAE}).save_pretrained(folder / "decoder")
    return make_tiny_sd(folder, vae_class=AutoencoderTiny, unet=UNET, vae=VAE, text_encoder=text)


@pytest.fixture
def called(monkeypatch):
    """How often each engine was called, by function."""
    found, call = Counter(), Engine.__call__

    def counting(engine, *tensors):
        found[engine.spec.network] += 1
        return call(engine, *tensors)

    monkeypatch.setattr(Engine, "__call__", counting)
    return found


@pytest.fixture
def traced(monkeypatch):
    """What is traced stands in the place of what the compiler would make of it, which has tests of its own."""
    monkeypatch.setitem(BACKENDS, BACKEND, Unchanged(BACKEND))


@NEEDS_IT
def test_an_engine_computes_the_gradient(folder, tmp_path, called):
    eager = dfkd.TeacherGuidance.of(ours(folder))
    expected = draw(folder, eager)
    assert not called and (expected - draw(folder, None)).abs().max() > 0.01
    guidance = dfkd.TeacherGuidance.of(with_engines(folder, tmp_path, {"gradient"}))
    called.clear()  # what building it measured
    found = draw(folder, guidance)
    assert called == {"gradient": GUIDED_STEPS * REPEATS}
    # float32: rounding of two orders of summation, which guidance of unit length carries on
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(guidance.record, eager.record, rtol=1e-3, atol=1e-3)
    measured = "1.0 ms a call, eager 2.0: 6 rows, 1 threads, when it was built"
    assert guidance.describe() == ["kernels: torch", f"gradient: {BACKEND} ({measured})"]
    with torch.inference_mode():
        torch.testing.assert_close(draw(folder, guidance), found, rtol=0, atol=1e-5)  # other kernels of the UNet


def test_without_engines_it_is_the_guidance_by_the_pipelines_own_decoder(folder):
    vae = theirs(folder, dtype=torch.float32).vae
    settings = {"step": 0.3, "bn_weight": 0.2, "repeats": REPEATS, "start": 0.2}
    own = dfkd.TeacherGuidance(classifier(size=SIDE), vae, **settings)
    guidance = dfkd.TeacherGuidance.of(ours(folder))
    assert guidance.config == own.config
    # float32: channels last in the one, not in the other
    torch.testing.assert_close(draw(folder, guidance), draw(folder, own), rtol=0, atol=1e-3)
    assert guidance.describe() == ["kernels: torch", "gradient: eager (the GuidedPipeline has no engines)"]
    assert own.describe()[1] == "gradient: eager (autograd through the pipeline's VAE)"


@pytest.mark.parametrize(
    "settings, names",
    [
        ({"batch": 2}, SPLIT),
        ({"batch": 2, "guidance_decoder": "decoder"}, SPLIT - {"decode"} | {"guidance_decode"}),
        ({"adv_weight": 1.0}, {"decode", "decode_vjp"}),
        ({"bn_stats": "image"}, {"gradient"}),
    ],
)
def test_engines_of_every_form_of_the_gradient(settings, names, folder, tmp_path, called, traced, monkeypatch):
    """A group in several calls, guidance by a decoder of its own, a student's loss, images that do not interact."""
    monkeypatch.chdir(folder)
    student = classifier(seed=9, size=SIDE) if "adv_weight" in settings else None
    expected = draw(folder, dfkd.TeacherGuidance.of(ours(folder, student, **settings)))
    guidance = dfkd.TeacherGuidance.of(with_engines(folder, tmp_path, names, student, **settings))
    called.clear()
    torch.testing.assert_close(draw(folder, guidance), expected, rtol=0, atol=1e-3)  # float32, as above
    assert called.keys() == names
    _, engines, *more = guidance.describe()
    assert set(engines.partition(":")[0].split(", ")) == names
    assert more == (["gradient in the image: eager (the student is replaced between runs)"] if student else [])


def test_guidance_goes_through_the_decoder_of_its_own(folder):
    guidance = dfkd.TeacherGuidance.of(ours(folder, guidance_decoder=str(folder / "decoder")))
    z0 = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = AutoencoderTiny.from_pretrained(folder / "decoder").decode(z0).sample
    torch.testing.assert_close(guidance.decode(z0), (wanted / 2 + 0.5).clamp(0, 1))
    assert not torch.equal(draw(folder, guidance), draw(folder, dfkd.TeacherGuidance.of(ours(folder))))


def test_a_call_of_several_groups_guides_each_by_itself(folder, tmp_path, called, traced):
    guidance = dfkd.TeacherGuidance.of(with_engines(folder, tmp_path, {"gradient"}))
    called.clear()
    clean = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    both = guidance.for_labels([*NAMES, *NAMES]).push(clean, 2, STEPS)
    assert called == {"gradient": 2 * REPEATS}
    each = [guidance.for_labels(NAMES).push(part, 2, STEPS) for part in clean.split(3)]
    assert torch.equal(both, torch.cat(each))


def test_pipelines_of_other_precisions_take_it(folder, tmp_path, called, traced):
    guidance = dfkd.TeacherGuidance.of(with_engines(folder, tmp_path, {"gradient"}))
    for dtype in (torch.bfloat16, torch.float64):
        called.clear()
        assert draw(folder, guidance, dtype=dtype).isfinite().all() and called["gradient"] == GUIDED_STEPS * REPEATS


def test_a_student_that_is_replaced_guides_from_then_on(folder):
    pipe = ours(folder, classifier(seed=9, size=SIDE), adv_weight=1.0)
    guidance = dfkd.TeacherGuidance.of(pipe)
    before = draw(folder, guidance)
    pipe.update(classifier(seed=4, size=SIDE))
    assert not torch.equal(draw(folder, guidance), before)


def test_calls_that_do_not_fit_are_refused_before_the_engine(folder, tmp_path, called, traced):
    guidance = dfkd.TeacherGuidance.of(with_engines(folder, tmp_path, {"gradient"}))
    called.clear()
    with pytest.raises(
        UsageError, match=r"2 images in a call: .* groups, which have 3 .*draw a multiple of 3, or .*=2"
    ):
        draw(folder, guidance, ["zero", "one"])
    with pytest.raises(UsageError, match=r"latents of the shape \[4, 8, 8\]: .* \[4, 4, 4\]\. draw images of 8 pix"):
        draw(folder, guidance, height=16, width=16)
    with pytest.raises(UsageError, match=r"latents on meta: .* on cpu, .*use pipe\.to"):
        guidance._gradient.require_fit(torch.empty(3, 4, 4, 4, device="meta"))
    assert not called


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"guidance_step": 0.0}, "a GuidedPipeline without guidance"),
        ({"bn_weight": 0.0, "cls_weight": 0.0}, "a GuidedPipeline without guidance"),
        ({"gradient": "unet"}, "gradient = 'unet': it acts outside the steps"),
        ({"refine_steps": 2}, "refine_steps = 2"),
        ({"cutmix_every": 1}, "cutmix_every = 1"),
        (
            {"backend": BACKEND},
            f"there is no {BACKEND} engine in .* for unet, decode, gradient: .*build it: dfkd-engines",
        ),
    ],
)
def test_pipelines_that_are_refused(settings, message, folder, tmp_path, traced):
    with pytest.raises(UsageError, match=message):
        dfkd.TeacherGuidance.of(ours(folder, engines=tmp_path, **settings))
