"""CompiledGuidance and CompiledPrior on the plain functions that engines are traced from: equal to autograd alone."""

from dataclasses import replace

import pytest
import torch

from dfkd.compiled import functions
from dfkd.compiled.functions import Sources, channels, function, one_by_one, samples, side_by_side
from dfkd.compiled.guidance import CompiledGuidance, CompiledPrior
from dfkd.synthesis.guidance import Guidance, LossWeights
from dfkd.synthesis.sampler import SamplerSettings, sample_group
from dfkd.synthesis.schedule import build_table
from dfkd.synthesis.statistics import tapped
from dfkd.teachers import checkpoint
from dfkd_engine.networks import Prior, load_prior
from tests.compiled.small_engines import make_teacher

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-11}
ROUNDED = {"rtol": 1e-6, "atol": 1e-7}  # a group's slopes reach an engine in float32, all else here is float64
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0])
WEIGHTS = LossWeights(0.3, 0.7)
SPLIT = ("decode", "image_moments", "image_gradient", "decode_vjp")


class Recorder(dict):
    """Plain functions in the place of engines, without gradients as engines have none; `called` names those in use."""

    def __init__(self, names, sources):
        super().__init__()
        self.called = []
        for name in names:
            self[name] = self._recorded(name, function(name, sources).call)

    def _recorded(self, name, call):
        def run(*tensors):
            assert not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
            self.called.append(name)
            with torch.no_grad():
                return call(*tensors)

        return run


@pytest.fixture(scope="module")
def loaded(prior):
    return load_prior(prior)


@pytest.fixture(scope="module")
def sources(loaded, teacher):
    classifier = checkpoint.load(None, teacher)
    classifier.module.requires_grad_(False)
    return Sources(loaded, classifier, WEIGHTS, (4, 4))


def in_float64(sources, weights=WEIGHTS):
    return replace(sources.doubled(), weights=weights)


def latents(count=7, dtype=F64):
    return torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(5)).to(dtype)


def both(sources, names, student=None):
    """By autograd, and by engines that are the plain functions."""
    weights, scale = sources.weights, sources.loss_scale
    plain = Guidance(sources.prior.decode, sources.teacher, weights, student, scale)
    engines = Recorder(names, sources)
    return plain, CompiledGuidance(plain, engines), engines


def compare(plain, compiled, points, micro, tolerance=EXACT):
    want, losses = plain.gradient(points, LABELS[: len(points)], micro)
    got, recorded = compiled.gradient(points, LABELS[: len(points)], micro)
    assert losses.keys() == recorded.keys() and want.norm() > 0
    torch.testing.assert_close(got, want, **tolerance)
    for name in losses:
        torch.testing.assert_close(recorded[name], losses[name], **tolerance)
    assert not got.requires_grad


@pytest.mark.parametrize("weights", [WEIGHTS, LossWeights(0.3, 0.0), LossWeights(0.0, 0.7),
                                     LossWeights(0.3, 0.7, bn_loss="relative")])  # fmt: skip
def test_whole_group(sources, weights):
    plain, compiled, engines = both(in_float64(sources, weights), ("gradient", "decode"))
    compare(plain, compiled, latents(), 7)
    assert engines.called == ["gradient"]


@pytest.mark.parametrize("micro, calls", [(7, 1), (3, 3)])
def test_statistics_of_every_image(sources, micro, calls):
    plain, compiled, engines = both(
        in_float64(sources, replace(WEIGHTS, bn_stats="image")), ("gradient", "decode", "decode_vjp")
    )
    compare(plain, compiled, latents(), micro)
    assert engines.called == ["gradient"] * calls


@pytest.mark.parametrize("kind", ["norm", "relative"])
@pytest.mark.parametrize("cls", [0.7, 0.0])
@pytest.mark.parametrize("micro", [1, 3, 6])
def test_cut_group_is_exact(sources, micro, cls, kind):
    """The split form's sum over micro-batches, against one expression differentiated whole, in float64."""
    in64 = in_float64(sources, LossWeights(0.3, cls, bn_loss=kind))
    plain, compiled, engines = both(in64, SPLIT)
    want, losses = plain.gradient(latents(), LABELS, 7)
    got, recorded = compiled.gradient(latents(), LABELS, micro)
    torch.testing.assert_close(got, want, **ROUNDED)
    assert recorded.keys() == losses.keys()
    for name in losses:
        torch.testing.assert_close(recorded[name], losses[name], **EXACT)
    calls = -(-7 // micro)
    phases = ["decode", "image_moments"] * calls + ["decode", "image_gradient", "decode_vjp"] * calls
    assert engines.called == phases


@pytest.mark.parametrize("micro", [7, 3])
@pytest.mark.parametrize("names", [("decode",), ("decode", "decode_vjp"), ("image_moments",), ()])
def test_networks_without_an_engine_stay_with_autograd(sources, micro, names):
    plain, compiled, engines = both(in_float64(sources), names)
    compare(plain, compiled, latents(), micro)
    assert set(engines.called) <= set(names)


@pytest.mark.parametrize("micro", [7, 3])
@pytest.mark.parametrize("stats", ["group", "image"])
def test_adversarial_loss(sources, tmp_path, micro, stats):
    in64 = in_float64(sources, LossWeights(0.3, 0.7, 1.5, bn_stats=stats))
    student = checkpoint.load(None, make_teacher(tmp_path / "student", seed=3))
    student.module.requires_grad_(False).double()
    names = ("decode", "decode_vjp", "gradient", "image_moments", "image_gradient", "pixel_gradient")
    plain, compiled, engines = both(in64, names, student)
    compare(plain, compiled, latents(), micro)
    assert compiled.gradient(latents(), LABELS, micro)[1].keys() == {"cls", "bn", "adv"}
    assert "decode_vjp" in engines.called and not {"gradient", "image_gradient"} & set(engines.called)
    images = in64.prior.decode(latents())
    compare(plain.on_pixels(), compiled.on_pixels(), images, micro)
    assert "pixel_gradient" not in engines.called


@pytest.mark.parametrize(
    "names, micro, called",
    [
        (("gradient", "pixel_gradient"), 7, ["pixel_gradient"]),
        (SPLIT, 3, ["image_moments"] * 3 + ["image_gradient"] * 3),
        (("gradient",), 7, []),  # never the latents' engine
        (("gradient", "decode"), 3, []),
    ],
)
def test_on_pixels(sources, names, micro, called):
    in64 = in_float64(sources)
    plain, compiled, engines = both(in64, names)
    compare(plain.on_pixels(), compiled.on_pixels(), in64.prior.decode(latents()), micro, ROUNDED)
    assert engines.called == called


def test_the_loss_scale_is_taken_back(sources):
    """A power of two moves exponents alone: the split form gives the same bits with and without."""
    found = []
    for scale in (1.0, 1024.0):
        scaled = replace(sources, loss_scale=scale)
        _, compiled, _ = both(scaled, SPLIT)
        found.append(compiled.gradient(latents(dtype=torch.float32), LABELS, 3)[0])
    assert torch.equal(*found)


def test_through_the_denoiser_it_is_autograd(sources):
    in64 = in_float64(sources)
    plain, compiled, engines = both(in64, ("gradient", *SPLIT))
    context = in64.prior.encode_prompts(["a photo"]).expand(7, -1, -1)

    def to_latent(z, rows):
        return z - 0.1 * in64.prior.denoise(z, 400.0, context[rows])

    want, _ = plain.gradient(latents(), LABELS, 7, to_latent)
    got, _ = compiled.gradient(latents(), LABELS, 7, to_latent)
    torch.testing.assert_close(got, want, **EXACT)
    assert engines.called == []


SETTINGS = SamplerSettings(guidance_step=0.2, cfg=3.0, refine_steps=2)


@pytest.mark.parametrize(
    "names, micro, more",
    [
        (("unet", "decode", "gradient", "pixel_gradient"), 7, {}),
        (("unet", *SPLIT), 3, {}),
        (("unet", "decode", "gradient"), 7, {"cutmix_every": 1, "cfg_from": 0.4, "noise_edit_steps": 1}),
        (("unet",), 3, {"guidance_norm": "none"}),
        (("decode",), 7, {"guidance_repeats": 2}),
    ],
)
def test_the_sampler_does_not_know(sources, names, micro, more):
    plain, compiled, engines = both(sources, names)
    settings = replace(SETTINGS, **more)
    want = sampled(sources.prior, plain, settings, micro)
    got = sampled(CompiledPrior.of(sources.prior, engines), compiled, settings, micro)
    # float32: the split form adds gradients up in another order
    torch.testing.assert_close(got.images, want.images, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.latents, want.latents, rtol=1e-5, atol=1e-5)
    assert got.curves.keys() == want.curves.keys() == {"cls", "bn"}
    for name in want.curves:
        torch.testing.assert_close(got.curves[name], want.curves[name], rtol=1e-4, atol=1e-5)
    assert set(engines.called) == set(names) and want.images.std() > 0.01


def test_unguided(sources):
    engines = Recorder(("unet", "decode"), sources)
    want = sampled(sources.prior, None, SETTINGS, 7)
    got = sampled(CompiledPrior.of(sources.prior, engines), None, SETTINGS, 7)
    torch.testing.assert_close(got.images, want.images, rtol=0, atol=1e-6)
    assert set(engines.called) == {"unet", "decode"}


def sampled(prior, guidance, settings, micro):
    words = prior.encode_prompts([f"a {label}" for label in LABELS.tolist()])
    table = build_table(prior.scheduler_config, "ddim", 3)
    nothing = prior.encode_prompts([""])
    ids = torch.arange(7)
    return sample_group(prior, guidance, table, settings, 11, ids, LABELS, words, nothing, (4, 4), micro)


def test_a_compiled_prior_is_a_prior(loaded):
    compiled = CompiledPrior.of(loaded, {})
    assert isinstance(compiled, Prior) and compiled.weights_digest == loaded.weights_digest
    z, context = latents(2, torch.float32), loaded.encode_prompts(["a photo", ""])
    assert torch.equal(compiled.denoise(z, 500, context), loaded.denoise(z, 500, context))
    assert torch.equal(compiled.decode(z), loaded.decode(z))


def test_rows_reach_the_engine_in_the_networks_dtype(prior):
    """What a guided step writes is what the engine is bound to, and both of its ends are half as wide."""
    half = load_prior(prior, torch.float16)
    sources = Sources(half, None, None, (4, 4))
    made = function("unet", sources)
    assert [spec.dtype for spec in made.inputs] == ["float16", "float32", "float16"]
    seen = []

    def unet(*tensors):
        seen.append([(x.dtype, x.is_contiguous()) for x in tensors])
        return made.call(*tensors)

    compiled = CompiledPrior.of(half, {"unet": unet})
    context = half.encode_prompts(["a", "b"])
    rows = compiled.unet_input.empty(2, latents(2)).copy_(latents(2))
    assert compiled.denoise(rows, 500.0, context).dtype == torch.float16
    wide = compiled.denoise(latents(2, torch.float32), 500.0, context)  # PyTorch's step keeps its rows in float32
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, half.denoise(latents(2, torch.float32), 500.0, context))
    assert seen == [[(torch.float16, True), (torch.float32, True), (torch.float16, True)]] * 2


def test_times_reach_the_engine_in_its_own_form(loaded):
    seen = []

    def unet(z, t, context):
        seen.append((t.dtype, tuple(t.shape), context.dtype, t.item()))
        return (z,)

    compiled = CompiledPrior.of(loaded, {"unet": unet})
    for t in (7, 7.0, torch.tensor(7), torch.tensor(7.0, dtype=F64)):
        compiled.denoise(latents(2, torch.float32), t, torch.zeros(2, 77, 32, dtype=torch.bfloat16))
    assert set(seen) == {(torch.float32, (1,), torch.float32, 7.0)}


class TestFunctions:
    def test_a_cut_group_by_hand(self, sources):
        """image_gradient is the gradient of weighted losses with the slopes held, decode_vjp autograd's own."""
        in64 = in_float64(sources)
        (z, noise) = samples("decode_vjp", sources, 3, 0)
        leaf = z.double().requires_grad_()
        (want,) = torch.autograd.grad(in64.prior.decode(leaf), leaf, noise.double())
        (got,) = function("decode_vjp", in64).call(z.double(), noise.double())
        torch.testing.assert_close(got, want, **EXACT)

        image, labels, slope1, slope2 = (
            x.double() if x.is_floating_point() else x for x in samples("image_gradient", sources, 3, 0)
        )
        leaf = image.clone().requires_grad_()
        with tapped(in64.teacher.batch_norms()) as moments:
            logits = in64.teacher.logits(leaf)
        m1, m2 = side_by_side(moments)
        loss = 0.7 * torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        loss = loss + 0.3 * (m1 @ slope1 + m2 @ slope2).sum()
        (want,) = torch.autograd.grad(loss, leaf)
        got, cls = function("image_gradient", in64).call(image, labels, slope1, slope2)
        torch.testing.assert_close(got, want, **EXACT)
        torch.testing.assert_close(cls, torch.nn.functional.cross_entropy(logits, labels, reduction="none"), **EXACT)

    def test_moments_side_by_side_and_back(self, sources):
        layers = sources.teacher.batch_norms()
        with tapped(layers) as moments:
            sources.teacher.logits(torch.rand(3, 3, 8, 8))
        m1, m2 = side_by_side(moments)
        assert m1.shape == m2.shape == (3, channels(sources.teacher)) == (3, 11)
        for back, there in zip(one_by_one(layers, m1, m2), moments, strict=True):
            assert torch.equal(back.m1, there.m1) and torch.equal(back.m2, there.m2)

    @pytest.mark.parametrize("network", functions.NETWORKS)
    def test_samples_fit_the_inputs(self, sources, network):
        made = function(network, sources)
        arguments = samples(network, sources, 3, 0)
        for tensor, spec in zip(arguments, made.inputs, strict=True):
            assert list(tensor.shape) == [3 if size is None else size for size in spec.shape]
            assert str(tensor.dtype) == f"torch.{spec.dtype}"
        results = made.call(*arguments)
        assert len(results) == len(made.outputs) and all(result.isfinite().all() for result in results)
        other = samples(network, sources, 3, 1)
        assert not torch.equal(arguments[0], other[0])
        assert all(map(torch.equal, arguments, samples(network, sources, 3, 0)))

    @pytest.mark.parametrize("network", functions.NETWORKS)
    def test_doubled_is_the_same_in_float64(self, sources, network):
        arguments = samples(network, sources, 3, 0)
        want = function(network, sources.doubled()).call(
            *(x.double() if x.is_floating_point() else x for x in arguments)
        )
        assert {result.dtype for result in want} == {F64}
        for got, exact in zip(function(network, sources).call(*arguments), want, strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)
        assert sources.prior.unet.dtype == torch.float32  # the networks themselves are left alone
