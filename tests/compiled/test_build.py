"""The workshop: builds, finds, adopts and rebuilds engines, and keeps none that misses its tolerance."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dfkd.cli.prepare import prepare
from dfkd.compiled import build, digests
from dfkd.compiled.build import Workshop, identity
from dfkd.compiled.choose import Choice, apply
from dfkd.compiled.functions import function, samples
from dfkd.compiled.requests import Request
from dfkd.compiled.sources import load_sources, sources_of
from dfkd.synthesis import taps
from dfkd_engine.backends import get
from dfkd_engine.compiled import Engine, load
from dfkd_engine.errors import EngineError
from dfkd_engine.parity import TOLERANCE, Tolerance
from dfkd_engine.store import EngineStore
from tests.compiled.small_engines import BACKEND, NEEDS_IT, flip_a_byte, key_of, nudge, options_of, recipes

pytestmark = NEEDS_IT


def request_of(network, prior, teacher, root, *more) -> Request:
    return recipes(options_of(prior, teacher, *more), BACKEND, root)[network]


def no_networks():
    raise AssertionError("the networks were loaded")


def workshop(store, prior, teacher):
    return Workshop(store, lambda: load_sources(options_of(prior, teacher), ["decode"]))


def test_what_is_current_needs_no_networks(place):
    store = EngineStore(place.store)
    found = recipes(options_of(place.prior, place.teacher), BACKEND, place.store)
    assert list(found) == ["unet", "decode", "gradient"]
    for network, request in found.items():
        state, manifest = Workshop(store, no_networks).build(request)
        assert state == "current" and manifest.key == key_of(place.store, network)


def test_what_is_known_of_an_engine(place):
    for manifest in EngineStore(place.store).list():
        spec, facts = manifest.spec, manifest.facts
        kind = "gradient" if spec.network == "gradient" else "forward"
        tolerance = TOLERANCE[kind, "float32"]
        assert 0 < facts["parity"]["relative"] <= tolerance.relative and facts["parity"]["samples"] == 7
        assert kind == "forward" or facts["parity"]["cosine"] >= 0.9999
        assert facts["compile_seconds"] > 0 and facts["nodes"] > 10
        rows = 12 if spec.network == "unet" else 6
        assert spec.batch == (1, rows, rows) and facts["milliseconds"]["rows"] == rows
        assert facts["milliseconds"]["threads"] == torch.get_num_threads()
        assert facts["milliseconds"]["engine"] > 0 < facts["milliseconds"]["eager"]
        assert isinstance(facts["rows_exact"], bool)
        assert (spec.backend, spec.dtype) == (BACKEND, "float32")
        assert {"torch", "diffusers", "onnxruntime"} <= dict(spec.versions).keys()


def test_an_engine_is_timed_beside_the_kernels_of_an_eager_run(own, copied, monkeypatch):
    """And holds none of them: it was traced with torch's."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernel is not interpreted here")
    launches, kernel = [], taps.batch_norm_tap
    monkeypatch.setattr(taps, "batch_norm_tap", lambda *given: launches.append(given) or kernel(*given))
    teacher = copied(own.teacher)
    nudge(teacher / "model.safetensors")
    options, store = options_of(own.prior, teacher), EngineStore(own.store)
    shop = Workshop(store, lambda: load_sources(options, ["gradient"]), kernels="triton")
    state, manifest = shop.build(recipes(options, BACKEND, own.store)["gradient"])
    assert state == "built" and manifest.facts["milliseconds"]["kernels"] == "triton"
    # two layers, once a turn and once to warm up
    assert len(launches) == 2 * (build.TIMED_TURNS + 1)


def test_half_precision(own, tmp_path):
    """Compiled, judged against float64 by half precision's tolerances, found again, and right about its dtype."""
    half = options_of(own.prior, own.teacher, "--dtype", "fp16")
    store = EngineStore(own.store)
    shop = Workshop(store, lambda: load_sources(half, ["decode", "gradient"]))
    for network, kind in (("decode", "forward"), ("gradient", "gradient")):
        request = recipes(half, BACKEND, own.store)[network]
        state, manifest = shop.build(request)
        assert state == "built" and manifest.spec.dtype == "float16"
        bound = TOLERANCE[kind, "float16"].relative
        assert 1e-5 < manifest.facts["parity"]["relative"] <= bound  # and coarser than float32's, so it is half
        assert shop.build(request).state == "current"
    brain = recipes(options_of(own.prior, own.teacher, "--dtype", "bf16"), BACKEND, own.store)["decode"]
    with pytest.raises(EngineError, match=r"cannot be built.*bfloat16 convolutions from opset 22"):
        shop.build(brain)


def test_what_another_process_built_meanwhile_is_adopted(own, copied):
    prior = copied(own.prior)
    nudge(next((prior / "vae").glob("*.safetensors")))
    request = request_of("decode", prior, own.teacher, own.store)

    class Late(EngineStore):
        """Comes second: the other one has built when the lock is free."""

        def build(self, spec, recipe, make):
            assert workshop(EngineStore(self.root), prior, own.teacher).build(request).state == "built"
            return super().build(spec, recipe, make)

    state, manifest = workshop(Late(own.store), prior, own.teacher).build(request)
    assert state == "adopted" and manifest == EngineStore(own.store).find(request.recipe)


@pytest.mark.parametrize("odd, exact", [(0, True), (16, False), (32, False), (48, True)])
def test_rows_that_depend_on_the_call_are_found(place, odd, exact):
    """An engine whose last row differs by a bit in calls of `odd` rows, as in a vector loop's remainder."""
    sources = sources_of(prepare(options_of(place.prior, place.teacher)))
    request = request_of("decode", place.prior, place.teacher, place.store, "--group", 64)
    decode = function("decode", sources)

    def run(z0):
        (image,) = decode.call(z0)
        if len(z0) == odd:
            image[-1] = torch.nextafter(image[-1], torch.ones(()))
        return (image,)

    spec = EngineStore(place.store).get(key_of(place.store, "decode")).spec
    engine = Engine(replace(spec, batch=(1, 64, 64)), run)
    assert build._rows_exact(request, engine, sources) is exact
    assert not build._rows_exact(replace(request, timed=8), engine, sources)  # two sizes were not compared


def test_a_changed_weight_is_built_anew(own, copied):
    prior = copied(own.prior)
    nudge(next((prior / "vae").glob("*.safetensors")))
    store = EngineStore(own.store)
    before = {manifest.key for manifest in store.list()}
    request = request_of("decode", prior, own.teacher, own.store)
    assert [field for field, _, _ in store.explain(request.recipe)] == ["prior.vae"]
    state, manifest = workshop(store, prior, own.teacher).build(request)
    assert state == "built" and {m.key for m in store.list()} == before | {manifest.key}
    old = store.get(next(m.key for m in store.list() if m.spec.network == "decode" and m.key != manifest.key))
    assert old.spec.graph == manifest.spec.graph and old.spec.weights != manifest.spec.weights
    assert store.explain(request.recipe) == [] and Workshop(store, no_networks).build(request).state == "current"
    # the new one computes what the new decoder does
    sources = load_sources(options_of(prior, own.teacher), ["decode"])
    (z,) = samples("decode", sources, 3, 0)
    (got,) = load(store, manifest.key, "cpu")(z)
    with torch.no_grad():
        torch.testing.assert_close(got, sources.prior.decode(z), rtol=1e-5, atol=1e-6)
        assert (load(store, old.key, "cpu")(z)[0] - got).abs().max() > 1e-3


def other_config(prior, monkeypatch):
    """An entry that decoding does not read."""
    file = prior / "vae/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latent_shift": 0.25}))


def other_encoder(prior, monkeypatch):
    file = next((prior / "vae").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.startswith("encoder.") and name.endswith("weight"))
    tensors[name] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def other_sources(prior, monkeypatch):
    monkeypatch.setattr(digests, "of_sources", lambda *places: "0" * 64)


@pytest.mark.parametrize(
    "change, fields",
    [
        (other_config, {"prior.vae", "prior.shapes"}),
        (other_encoder, {"prior.vae"}),
        (other_sources, {"sources"}),
    ],
)
def test_an_equal_graph_is_adopted(own, copied, monkeypatch, change, fields):
    prior = copied(own.prior)
    change(prior, monkeypatch)
    monkeypatch.setattr(type(get(BACKEND)), "compile", lambda *_: pytest.fail("it was compiled"))
    store = EngineStore(own.store)
    request = request_of("decode", prior, own.teacher, own.store)
    assert {field for field, _, _ in store.explain(request.recipe)} == fields
    state, manifest = workshop(store, prior, own.teacher).build(request)
    assert state == "adopted" and manifest.key == key_of(own.store, "decode")
    assert Workshop(store, no_networks).build(request).state == "current"
    # and it may be used with the networks that it was adopted for
    synthesis = prepare(options_of(prior, own.teacher))
    applied = apply(synthesis, sources_of(synthesis), (Choice("decode", BACKEND, manifest.key, ""),), store)
    assert set(applied.prior.engines) == {"decode"}


def test_a_damaged_engine_is_built_anew(own):
    store = EngineStore(own.store)
    flip_a_byte(own.store, "decode")
    request = request_of("decode", own.prior, own.teacher, own.store)
    assert store.explain(request.recipe)[0][0] == "engine"
    key = key_of(own.store, "decode")
    state, manifest = workshop(store, own.prior, own.teacher).build(request)
    assert state == "built" and manifest.key == key and store.problem(key) is None


def a_little_off(monkeypatch):
    """An engine that compiles a wrong program: one pixel value in a thousand parts."""
    real = type(get(BACKEND)).load

    def wrong(*arguments):
        run = real(*arguments)
        return lambda *tensors: tuple(result * 1.001 for result in run(*tensors))

    monkeypatch.setattr(type(get(BACKEND)), "load", wrong)


def not_finite(monkeypatch):
    real = type(get(BACKEND)).load

    def wrong(*arguments):
        run = real(*arguments)
        return lambda *tensors: tuple(result / 0 for result in run(*tensors))

    monkeypatch.setattr(type(get(BACKEND)), "load", wrong)


def a_stricter_bound(monkeypatch):
    monkeypatch.setitem(build.TOLERANCE, ("forward", "float32"), Tolerance(1e-9))


def test_an_engine_that_misses_its_tolerance_is_not_saved(place, tmp_path, monkeypatch):
    store = EngineStore(tmp_path / "store")
    request = request_of("decode", place.prior, place.teacher, tmp_path)
    shop = workshop(store, place.prior, place.teacher)
    compiled, real = {}, type(get(BACKEND)).compile

    def once(self, graph, spec, folder):
        """Compiled a single time: this test is of what comes after."""
        if not compiled:
            real(self, graph, spec, folder)
            compiled.update({path.name: path.read_bytes() for path in folder.iterdir()})
        for name, data in compiled.items():
            (folder / name).write_bytes(data)

    monkeypatch.setattr(type(get(BACKEND)), "compile", once)
    for spoil, words in (
        (a_little_off, r"its relative error is 1\.0e-03, allowed is 1e-05"),
        (not_finite, "its relative error is inf"),
        (a_stricter_bound, r"its relative error is \d\.\de-0[678], allowed is 1e-09"),
    ):
        with monkeypatch.context() as patch:
            spoil(patch)
            with pytest.raises(EngineError, match=f"decode in {BACKEND}, up to 6 rows is not saved.*{words}") as caught:
                shop.build(request)
            assert "use another backend for this network" in str(caught.value)
        assert not store.list() and not store.verify()
        assert store.find(request.recipe) is None and store.explain(request.recipe)[0][0] == "network"
        assert not [path for path in store.root.rglob("*") if path.is_file() and path.parent.name != "locks"]
    assert shop.build(request).state == "built"
    assert [verdict.problem for verdict in store.verify()] == [None]


def test_a_backend_that_cannot_be_used_is_named(place, tmp_path, monkeypatch):
    monkeypatch.setattr(type(get(BACKEND)), "unusable", lambda *_: "onnxruntime is not installed")
    request = request_of("decode", place.prior, place.teacher, tmp_path)
    with pytest.raises(EngineError, match=r"decode in .* cannot be built: onnxruntime is not installed.*--backend"):
        workshop(EngineStore(tmp_path / "store"), place.prior, place.teacher).build(request)
    assert not (tmp_path / "store").exists()


def test_identity_is_of_what_an_engine_holds(place, copied):
    def of(prior, teacher):
        sources = load_sources(options_of(prior, teacher), ["gradient"])
        return {network: identity(network, sources) for network in ("unet", "decode", "gradient", "image_moments")}

    def changed(part):
        prior, teacher = copied(place.prior), copied(place.teacher)
        nudge(next(((prior / part) if part else teacher).glob("*.safetensors")))
        after = of(prior, teacher)
        for folder in (prior, teacher):
            folder.rename(folder.with_name(f"{folder.name}-{part}"))
        return {network for network, found in before.items() if found != after[network]}

    before = of(place.prior, place.teacher)
    assert set(before["gradient"]) == {"decoder_digest", "teacher_digest"}
    assert changed("unet") == {"unet"}
    assert changed("vae") == {"decode", "gradient"}
    assert changed("") == {"gradient", "image_moments"}
    assert changed("text_encoder") == set()
