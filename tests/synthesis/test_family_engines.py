"""Engines of every family's networks: built by the compilers that are here, judged per image, and used by a run."""

import importlib.util

import pytest
import torch

from dfkd.compiled.engines import build
from dfkd.config import GenerateConfig
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd_engine.backends import get
from dfkd_engine.priors.prior import Prior
from dfkd_engine.store import EngineStore
from tests.synthesis.small_networks import classifier

SAMPLERS = {"lcm": "lcm", "sd3": "euler"}
FAMILIES = ("sd2", "lcm", "sdxl", "dit", "sd3", "pixels", "class-pixels")
ONNX = pytest.mark.skipif(get("onnxruntime").unusable("cpu") is not None, reason="needs the extra onnx")
INDUCTOR = pytest.mark.skipif(get("inductor").unusable("cpu") is not None, reason="needs a C++ compiler")
RTX = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")


def pipeline(folder, name, **settings):
    common = {"device": "cpu", "kernels": "torch", "steps": 2, "group": 2, "batch": 2, "bn_stats": "image"}
    config = GenerateConfig.of(**(common | {"sampler": SAMPLERS.get(name, "ddim"), **settings}))
    return GuidedPipeline(Prior.from_pretrained(folder), classifier(size=16), config)


def denoiser(folder, name):
    (function,) = (f for f in pipeline(folder, name, backend="eager").functions() if f.name == "unet")
    return function


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@ONNX
def test_onnx_runtime_takes_the_denoiser(name, tiny_prior, tmp_path):
    state, manifest = build(denoiser(tiny_prior(name), name), "onnxruntime", EngineStore(tmp_path))
    assert state == "built" and manifest.facts["parity"]["relative"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "sd3", "class-pixels"])
@ONNX
@pytest.mark.skipif(importlib.util.find_spec("modelopt") is None, reason="needs the extra quantise")
def test_a_denoiser_in_eight_bits(name, tiny_prior, tmp_path):
    pipe = pipeline(tiny_prior(name), name, backend="onnxruntime", quantise="int8", engines=tmp_path)
    (function,) = (f for f in pipe.functions() if f.name == "unet")
    state, manifest = build(function, "onnxruntime", EngineStore(tmp_path))
    assert state == "built" and 1e-4 < manifest.facts["parity"]["relative"] < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@INDUCTOR
def test_inductor_takes_the_denoiser(name, tiny_prior, tmp_path):
    state, manifest = build(denoiser(tiny_prior(name), name), "inductor", EngineStore(tmp_path))
    assert state == "built" and manifest.facts["parity"]["relative"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@RTX
def test_tensorrt_rtx_takes_the_denoiser_ahead_of_time(name, tiny_prior, tmp_path):
    state, _ = build(denoiser(tiny_prior(name), name), "tensorrt-rtx", EngineStore(tmp_path), targets=("sm_89",))
    assert state == "built"


@ONNX
def test_a_run_by_the_engine_of_a_denoiser_with_class_ids_is_the_eager_run(tiny_prior, tmp_path):
    eager = pipeline(tiny_prior("dit"), "dit", backend="eager")
    pipe = pipeline(tiny_prior("dit"), "dit", backend="auto", engines=tmp_path)
    function = denoiser(tiny_prior("dit"), "dit")
    assert [(spec.name, spec.dtype) for spec in function.inputs][2:] == [("class_id", "int64")]
    _, manifest = build(function, "onnxruntime", EngineStore(tmp_path))
    assert manifest.facts["parity"]["relative"] < 1e-4
    assert pipe.use_engines({"unet": manifest.key}) == {"unet": manifest.key}
    ids = torch.arange(2)
    # rounding of both, through two guided steps
    torch.testing.assert_close(pipe.latents(pipe.pack(ids, 0)), eager.latents(eager.pack(ids, 0)), rtol=1e-3, atol=1e-3)
