"""The networks as functions for compilers: what each computes, which a pipeline has, and engines in their place."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfkd.compiled.choose import Choice
from dfkd.compiled.engines import engine_spec
from dfkd.synthesis.bn_statistics import record_bn_inputs, side_by_side
from dfkd.synthesis.functions import EngineGuidance, Networks
from dfkd.synthesis.guidance import Guidance
from dfkd.synthesis.losses import CrossEntropy
from dfkd_engine.backends import compile_graph, get
from dfkd_engine.graph import trace
from tests.synthesis.small_networks import CHANNELS, SIDE, SmallPrior, classifier, pipeline

F64 = torch.float64
SEED, LABELS = 11, torch.tensor([0, 1, 2, 0, 1, 2, 0])
WHOLE = ("unet", "decode", "gradient", "pixel_gradient")
CUT = ("unet", "decode", "image_moments", "image_gradient", "decode_vjp")
REFINED = {"refine_steps": 2, "guidance_step": 0.1}


def in64(tensors):
    return tuple(x.double() if x.is_floating_point() else x for x in tensors)


def every_function():
    """By name, of a group in one call and of one in several."""
    found = (*pipeline(**REFINED).functions(), *pipeline(**REFINED, batch=3).functions())
    return {function.name: function for function in found}


@pytest.mark.parametrize(
    "own, names",
    [
        ({"guidance_step": 0.0}, ("unet", "decode")),
        ({}, ("unet", "decode", "gradient")),
        (REFINED, WHOLE),
        ({"batch": 3}, CUT),
        ({"batch": 3, "bn_stats": "image"}, ("unet", "decode", "gradient")),
        ({"student": classifier(seed=9), "adv_weight": 1.0}, ("unet", "decode", "decode_vjp")),
        ({"student": classifier(seed=9), "adv_weight": 1.0, "batch": 3}, (*CUT[:3], "decode_vjp")),
        ({"gradient": "unet"}, ()),
    ],
)
def test_functions_that_a_pipeline_has(own, names):
    assert tuple(function.name for function in pipeline(**own).functions()) == names


def test_rows_of_calls():
    """A UNet has two rows an image; a group's whole gradient has one shape; another call serves any batch up to 64."""
    found = {name: (f.rows, f.largest, f.one_shape) for name, f in every_function().items()}
    assert found["unet"] == (6, 128, False) and found["gradient"] == found["pixel_gradient"] == (7, 7, True)
    assert {found[name] for name in CUT[1:]} == {(3, 64, False)}
    images = {f.name: f for f in pipeline(bn_stats="image", cfg=1.0).functions()}
    assert [(f.rows, f.one_shape) for f in images.values()] == [(7, False)] * 3


@pytest.mark.parametrize("name", (*WHOLE, *CUT[2:]))
def test_samples_fit_and_float64_is_the_same_function(name):
    function = every_function()[name]
    arguments = function.samples(3, 0)
    for tensor, spec in zip(arguments, function.inputs, strict=True):
        assert list(tensor.shape) == spec.sizes(3) and str(tensor.dtype) == f"torch.{spec.dtype}"
    results, exact = function.call(*arguments), function.exact()(*in64(arguments))
    for got, want, spec in zip(results, exact, function.outputs, strict=True):
        assert list(got.shape) == spec.sizes(3) and want.dtype == F64
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, arguments, function.samples(3, 0)))
    assert not torch.equal(arguments[0], function.samples(3, 1)[0])


@pytest.mark.skipif(get("onnxruntime").unusable("cpu") is not None, reason="needs the extra onnx")
@pytest.mark.parametrize("name", ["gradient", "decode_vjp"])
def test_a_graph_brings_gradients_into_float16s_range_too(name, tmp_path):
    """Of float32 networks here, which the power of two must not change: ONNX Runtime's CPU has hardly any float16."""
    pipe = pipeline(bn_stats="image", batch=3)
    own = Guidance(pipe.prior.decode, pipe.teacher, (CrossEntropy(1e9),), narrow=True)
    (function,) = (f for f in every_function().values() if f.name == name)
    call = getattr(Networks(pipe.prior, own), name)
    outputs = [output.name for output in function.outputs][: 2 if name == "gradient" else 1]
    graph, backend = trace(call, function.inputs, output_names=outputs), get("onnxruntime")
    assert any(node.target is torch.ops.aten.pow.Scalar for node in graph.module.graph.nodes)
    spec = replace(engine_spec(function, "onnxruntime", "cpu test"), outputs=graph.outputs)
    compile_graph(backend, graph, spec, tmp_path)
    arguments = function.samples(3, 0)
    got, want = backend.load(tmp_path, spec, "cpu")(*arguments)[0], call(*arguments)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.skipif(get("onnxruntime").unusable("cpu") is not None, reason="needs the extra onnx")
@pytest.mark.parametrize("resize", ["antialias", "published"])
def test_an_engine_shows_the_teacher_smaller_images_as_autograd_does(resize, tmp_path):
    pipe = pipeline(teacher=classifier().replace(input_size=5, resize=resize), bn_stats="image")
    (function,) = (f for f in pipe.functions() if f.name == "gradient")
    outputs = [output.name for output in function.outputs]
    graph, backend = trace(function.call, function.inputs, output_names=outputs), get("onnxruntime")
    spec = engine_spec(function, "onnxruntime", "cpu test")
    compile_graph(backend, graph, spec, tmp_path)
    arguments = function.samples(3, 0)
    found, exact = backend.load(tmp_path, spec, "cpu")(*arguments), function.exact()(*in64(arguments))
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    other = pipeline(teacher=classifier().replace(input_size=5, resize="published"), bn_stats="image").functions()[-1]
    assert (resize == "published") == torch.equal(function.call(*arguments)[0], other.call(*arguments)[0])
    assert (resize == "published") == (engine_spec(other, "onnxruntime", "cpu test").key() == spec.key())


RELU = nn.Sequential(
    nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 7, 3), nn.ReLU(),
    nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(28, 3),
)  # fmt: skip
VIEWS = {"guide_shift": 2, "guide_flip": True, "guide_crop": 0.6, "guide_colour": 0.3}
OPTIONS = {**VIEWS, "softplus_beta": 3.0, "margin_discount": 0.5, "joint_temperature": 0.8, "tv_weight": 0.1}
SEEN = ("gradient", "pixel_gradient", "image_moments", "image_gradient")


def with_options(**own):
    teacher = classifier().replace(module=RELU.eval().requires_grad_(False))
    return pipeline(teacher=teacher, **{**REFINED, **OPTIONS, **own})


def option_functions(**own):
    found = (*with_options(**own).functions(), *with_options(**own, batch=3).functions())
    return {function.name: function for function in found}


def test_views_are_an_input_of_what_the_teacher_sees_and_of_nothing_else():
    for width, own in ((16, {}), (4, {"guide_colour": 0.0})):
        found = option_functions(**own)
        for name, function in found.items():
            inputs = [spec.name for spec in function.inputs]
            assert inputs.count("view") == (name in SEEN) and (name not in SEEN or inputs[-1] == "view")
            if name in SEEN:
                assert function.samples(3, 0)[-1].shape == (3, width)
    assert all("view" not in [spec.name for spec in f.inputs] for f in every_function().values())


@pytest.mark.skipif(get("onnxruntime").unusable("cpu") is not None, reason="needs the extra onnx")
@pytest.mark.parametrize("name", SEEN)
def test_an_engine_makes_the_views_itself(name, tmp_path):
    """With softplus' slopes, the tempered cross-entropy and the total variation, beside float64."""
    function, backend = option_functions()[name], get("onnxruntime")
    graph = trace(function.call, function.inputs, output_names=[output.name for output in function.outputs])
    spec = engine_spec(function, "onnxruntime", "cpu test")
    compile_graph(backend, graph, spec, tmp_path)
    arguments = function.samples(3, 0)
    found, exact = backend.load(tmp_path, spec, "cpu")(*arguments), function.exact()(*in64(arguments))
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    plain = {f.name: f for f in every_function().values()}[name]
    assert len(plain.inputs) == len(function.inputs) - 1


def test_the_split_form_by_hand():
    """image_gradient is the gradient of weighted losses with the group's slopes held, decode_vjp autograd's own."""
    pipe = pipeline(batch=3, bn_loss="relative")
    found = {function.name: function for function in pipe.functions()}
    z, noise = in64(found["decode_vjp"].samples(3, 0))
    prior, teacher = pipe.prior.doubled(), classifier(dtype=F64)
    leaf = z.requires_grad_()
    (want,) = torch.autograd.grad(prior.decode(leaf), leaf, noise)
    torch.testing.assert_close(found["decode_vjp"].exact()(z, noise)[0], want, rtol=1e-9, atol=1e-9)

    image, labels, mean1, mean2 = in64(found["image_gradient"].samples(3, 0))
    means, leaf = (mean1.requires_grad_(), mean2.requires_grad_()), image.requires_grad_()
    layers = teacher.batch_norms()
    variance = torch.cat([layer.running_var + layer.eps for layer in layers])
    sizes = torch.cat([torch.full((layer.num_features,), layer.num_features * len(layers)) for layer in layers])
    ratio = (means[1] - means[0] ** 2 + layers[0].eps) / variance
    loss = ((means[0] ** 2 / variance + (ratio.sqrt() - 1) ** 2) / sizes).sum()
    slopes = torch.autograd.grad(loss, means)
    with record_bn_inputs(layers) as moments:
        logits = teacher.logits(leaf)
    m1, m2 = side_by_side(moments)
    total = 0.7 * F.cross_entropy(logits, labels, reduction="sum") + 0.3 * (m1 @ slopes[0] + m2 @ slopes[1]).sum()
    (want,) = torch.autograd.grad(total, leaf)
    got, cls, bn = found["image_gradient"].exact()(image.detach(), labels, mean1.detach(), mean2.detach())
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cls, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bn, loss.expand(3), rtol=1e-9, atol=1e-9)


def key(name, own=None, **settings):
    """The key of the engine of a function, in a backend whose rows are free."""
    function = next(f for f in pipeline(**(own or {}), **settings).functions() if f.name == name)
    return engine_spec(function, "inductor", "cpu test").key()


def test_an_engine_follows_from_what_is_in_it_and_nothing_else():
    unet, gradient = key("unet"), key("gradient")
    assert key("unet", bn_weight=0.2) == unet and key("unet", {"teacher": classifier(seed=1)}) == unet
    assert key("unet", {"prior": SmallPrior(seed=2)}) != unet
    for own, settings in (
        ({"prior": SmallPrior(seed=2)}, {}), ({"teacher": classifier(seed=1)}, {}), ({}, {"bn_weight": 0.2}),
        ({}, {"bn_loss": "relative"}), ({}, {"cls_weight": 0.0}), ({}, {"group": 5}),
        ({}, {"guide_shift": 1}), ({}, {"tv_weight": 0.1}), ({}, {"margin_discount": 0.5}),
    ):  # fmt: skip
        assert key("gradient", own, **settings) != gradient
    assert key("gradient", sampler="euler", steps=9, cfg=1.0, guidance_power=1.0) == gradient
    assert key("gradient", guide_shift=1) == key("gradient", guide_shift=2)  # which view is an input
    net = {"teacher": classifier().replace(module=RELU.eval().requires_grad_(False))}
    assert len({key("gradient", net, softplus_beta=beta) for beta in (0.0, 3.0, 4.0)}) == 3
    assert key("decode", batch=5) == key("decode")  # one engine serves other --batch


class Recorder(dict):
    """Engines that are the functions themselves; notes which are called, and refuses gradients, as engines do."""

    def __init__(self, functions):
        super().__init__()
        self.called = set()
        for function in functions:
            self[function.name] = self.recording(function)

    def recording(self, function):
        def call(*tensors):
            self.called.add(function.name)
            assert not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
            for tensor, spec in zip(tensors, function.inputs, strict=True):
                assert list(tensor.shape[1:]) == list(spec.shape[1:]), spec.name
            return function.call(*tensors)

        return call


@pytest.mark.parametrize(
    "own, called",
    [
        (REFINED, WHOLE),
        ({**REFINED, "batch": 3}, CUT),
        ({**REFINED, "bn_stats": "image", "batch": 3}, WHOLE),
        ({**REFINED, "adv_weight": 1.0, "batch": 3, "noise_edit_steps": 1}, (*CUT[:3], "decode_vjp")),
        ({"guidance_step": 0.0}, ("unet", "decode")),
        ({**REFINED, **VIEWS, "reencode": 1, "reencode_level": 0.5}, WHOLE),
        ({**REFINED, **VIEWS, "batch": 3}, CUT),
        ({**REFINED, **VIEWS, "adv_weight": 1.0, "adv_loss": "reference", "batch": 3}, (*CUT[:3], "decode_vjp")),
    ],
)
def test_engines_stand_in_for_their_functions(monkeypatch, own, called):
    """Images are the same, by the engines that the pipeline has functions for."""
    pipe = pipeline(student=classifier(seed=9) if "adv_weight" in own else None, **own)
    images = pipe(range(7), seed=SEED).images
    engines = Recorder(pipe.functions())
    chosen = tuple(Choice(name, "recorder", f"key of {name}", "for the test") for name in engines)
    monkeypatch.setattr("dfkd.synthesis.pipeline.choose", lambda *_: chosen)
    monkeypatch.setattr("dfkd.synthesis.pipeline.load_engines", lambda *_: engines)
    assert pipe.use_engines({}) == {name: f"key of {name}" for name in engines}
    found = pipe(range(7), seed=SEED).images
    assert (found.int() - images.int()).abs().max() <= 1  # the split form rounds otherwise
    assert engines.called == set(called)


def test_engines_stay_while_a_student_comes_and_goes(monkeypatch):
    own, student = {**REFINED, "batch": 3}, classifier(seed=9)
    plain = pipeline(**own)(range(7), seed=SEED).images
    pipe = pipeline(student=student, adv_weight=1.0, **own)
    pipe.update(None)
    engines = Recorder(pipe.functions())
    chosen = tuple(Choice(name, "recorder", f"key of {name}", "for the test") for name in engines)
    monkeypatch.setattr("dfkd.synthesis.pipeline.choose", lambda *_: chosen)
    monkeypatch.setattr("dfkd.synthesis.pipeline.load_engines", lambda *_: engines)
    pipe.use_engines({})
    for now in (None, student):
        pipe.update(now)
        wanted = pipeline(student=now, adv_weight=1.0, **own)(range(7), seed=SEED).images if now else plain
        engines.called.clear()
        assert (pipe(range(7), seed=SEED).images.int() - wanted.int()).abs().max() <= 1  # as above
        assert engines.called == {*CUT[:3], "decode_vjp"}


def test_functions_without_an_engine_stay_with_autograd():
    pipe = pipeline()
    z = torch.randn(7, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    want, losses = pipe.guidance.gradient(z, LABELS, 7)
    got, others = EngineGuidance(pipe.guidance, {}).gradient(z, LABELS, 7)
    assert torch.equal(got, want) and all(torch.equal(losses[name], others[name]) for name in losses)
    assert isinstance(pipe.guidance, Guidance)
