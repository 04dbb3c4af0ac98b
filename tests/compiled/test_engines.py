"""An engine's key follows from the function by itself; building finds, makes, judges, times and mends."""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from torch.nn import ModuleList

from dfkd.compiled import engines
from dfkd.compiled.engines import build, engine_spec, reasons
from dfkd.errors import UsageError
from dfkd.extension import make
from dfkd_engine.backends import BACKENDS
from dfkd_engine.compiled import load
from dfkd_engine.devices import architecture, family
from dfkd_engine.errors import EngineError
from dfkd_engine.group_norms import KERNELS, group_norms
from dfkd_engine.parity import TOLERANCE, Tolerance
from dfkd_engine.spec import TensorSpec, differences
from tests.compiled.small_functions import BACKEND, NEEDS_IT, Distance, Unchanged, decode, flip_a_byte, gradient

HERE = architecture("cpu")
GPU = "cuda sm_89 NVIDIA L4"

LOSS = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Brightness:
    weight: float = 1.0

    def __call__(self, y):
        return self.weight * y.flatten(1).FOLD(1)
"""
BACKEND_FILE = """
import torch
from dfkd_engine.export import to_program

class Program:
    name, stored, fixed_rows, targets = "program", True, False, ()

    def unusable(self, device, dtype="float32"):
        return None

    def versions(self):
        return {"torch": torch.__version__}

    def flags(self, device):
        return {}

    def compile(self, graph, spec, folder):
        torch.export.save(to_program(graph), folder / "program.pt2")

    def load(self, folder, spec, device):
        module = torch.export.load(folder / "program.pt2").module()
        return lambda *tensors: tuple(module(*tensors))
"""


def spec_of(function, backend=BACKEND, device=HERE):
    return engine_spec(function, backend, device)


def changed(one, other, **more):
    """Fields in which the specs of two functions differ, which are those in which their keys do."""
    found = [field for field, _, _ in differences(spec_of(one, **more), spec_of(other, **more))]
    assert (spec_of(one, **more).key() != spec_of(other, **more).key()) == bool(found)
    return found


class TestKey:
    def test_it_is_the_same_for_the_same_function(self):
        assert spec_of(gradient()).key() == spec_of(gradient()).key() and len(spec_of(gradient()).key()) == 24

    def test_a_field_of_a_loss_is_in_it_by_itself(self):
        assert changed(gradient(Distance(0.5)), gradient(Distance(0.25))) == ["config.losses"]
        assert changed(gradient(Distance(0.5)), gradient(Distance(0.5, target=1.0))) == ["config.losses"]

    def test_and_so_is_a_loss_in_a_file_of_the_users(self, tmp_path):
        functions = []
        for folder, fold, weight in (("a", "sum", 1.0), ("b", "sum", 2.0), ("c", "mean", 1.0)):
            (tmp_path / folder).mkdir()
            file = tmp_path / folder / "own.py"
            file.write_text(LOSS.replace("FOLD", fold))
            functions.append(gradient(make(f"{file}:Brightness(weight={weight})", {}, "loss")))
        assert changed(functions[0], functions[1]) == ["config.losses"]  # its field
        assert changed(functions[0], functions[2]) == ["config.losses"]  # its code

    def test_every_component_is_in_it(self):
        one = decode(components={"vae": "a" * 64, "vae config": "b" * 64})
        assert changed(one, replace(one, components={**one.components, "vae config": "c" * 64})) == [
            "components.vae config"
        ]
        assert changed(decode(0), decode(1)) == ["components.network"]

    @pytest.mark.parametrize(
        "fields, found",
        [
            ({"sources": "other code"}, ["sources"]),
            ({"dtype": "float16"}, ["dtype"]),
            ({"largest": 24}, ["rows.planned", "rows.largest"]),
            ({"inputs": (TensorSpec("image", (None, 3, 8, 8), "float32"),)}, ["inputs.1"]),
            ({"rows": 3}, []),  # one engine serves every size of a call
            ({"one_shape": True}, ["rows.planned", "rows.largest"]),
        ],
    )
    def test_fields(self, fields, found):
        assert changed(decode(), decode(**fields)) == found

    def test_a_compiler_for_fixed_rows_takes_those_of_the_calls(self, monkeypatch):
        monkeypatch.setitem(BACKENDS, "fixed", Unchanged("fixed", fixed_rows=True))
        assert spec_of(decode(), "fixed").rows == (1, 6, 6) and spec_of(decode()).rows == (1, 12, 12)
        assert changed(decode(), decode(rows=3), backend="fixed") == ["rows.planned", "rows.largest"]

    def test_versions_device_backend_and_the_engines_code_are_in_it(self, unchanged, monkeypatch):
        one = spec_of(decode(), "unchanged")
        assert {"torch", "diffusers"} < one.versions.keys()
        assert spec_of(decode(), "unchanged", "cpu riscv64").key() != one.key() != spec_of(decode()).key()
        monkeypatch.setattr(unchanged, "versions_here", {"unchanged": "2"})
        assert [field for field, *_ in differences(one, spec_of(decode(), "unchanged"))] == ["versions.unchanged"]
        monkeypatch.undo()
        monkeypatch.setattr(engines, "sources_digest", lambda: "another commit")
        assert [field for field, *_ in differences(spec_of(decode()), one)].count("sources") == 1

    def test_eight_bits(self):
        one, other = decode(), decode(quantise="int8")
        assert {"flags.quantise", "sources"} <= set(changed(one, other))
        assert reasons(differences(spec_of(one), spec_of(other))) == ["it was not built with this --quantise yet"]

    def test_only_a_gpus_inductor_chooses_between_group_norms(self):
        asked = [(decode(), "inductor", GPU), (decode(), "inductor", HERE), (decode(), "tensorrt", GPU)]
        asked.append((decode(networks=()), "inductor", GPU))
        assert ["group_norm" in engine_spec(*one).flags for one in asked] == [True, False, False, False]


@NEEDS_IT
def test_from_nothing_to_an_engine_and_back(store):
    """Both kinds, in a real compiler: built once, judged, timed, found again, and equal to eager."""
    said = []
    for function in (decode(), gradient()):
        state, manifest = build(function, BACKEND, store, say=said.append)
        assert state == "built" and store.find(spec_of(function)) == manifest
        assert build(function, BACKEND, store, say=said.append) == ("current", manifest)
        facts, tolerance = manifest.facts, TOLERANCE[function.kind, "float32"]
        assert 0 < facts["parity"]["relative"] <= tolerance.relative and facts["parity"]["samples"] == 7
        assert facts["compile_seconds"] > 0
        times = facts["milliseconds"]
        assert times["engine"] > 0 < times["eager"] and times["rows"] == 6
        assert (times["threads"], times["kernels"]) == (torch.get_num_threads(), "torch")
        arguments = function.samples(5, 3)
        for got, want in zip(load(store, manifest.key, "cpu")(*arguments), function.call(*arguments), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert [line.partition(": ") for line in said] == [
        (f"{name} in {BACKEND}, up to 12 rows", ": ", "it was not built yet") for name in ("decode", "gradient")
    ]


class TestBuild:
    def test_a_changed_weight_is_another_engine_beside_the_first(self, store, unchanged):
        _, first = build(decode(0), "unchanged", store)
        state, second = build(decode(1), "unchanged", store)
        assert state == "built" and {first.key, second.key} == {manifest.key for manifest in store.list()}
        (x,) = decode().samples(4, 0)
        for seed, manifest in ((0, first), (1, second)):
            torch.testing.assert_close(load(store, manifest.key, "cpu")(x), decode(seed).call(x))

    def test_a_damaged_engine_is_mended(self, store, unchanged):
        _, manifest = build(decode(), "unchanged", store)
        (store.root / manifest.key / "payload" / "engine").write_text("7")
        said = []
        state, again = build(decode(), "unchanged", store, say=said.append)
        assert (state, again.key) == ("built", manifest.key) and "it is damaged: engine was altered" in said[0]
        assert store.problem(manifest.key) is None

    def test_a_graph_is_traced_once_for_several_backends(self, store, unchanged, monkeypatch):
        other = Unchanged("other")
        monkeypatch.setitem(BACKENDS, "other", other)
        function = decode()
        for name in ("unchanged", "other"):
            build(function, name, store)
        assert unchanged.compiled[0] is other.compiled[0]

    def test_what_another_process_built_meanwhile_is_taken(self, store, unchanged, monkeypatch):
        real, first = store.build, []

        def late(spec, make):
            if not first:
                first.append(None)
                assert build(decode(), "unchanged", store)[0] == "built"
            return real(spec, make)

        monkeypatch.setattr(store, "build", late)
        assert build(decode(), "unchanged", store)[0] == "current" and len(unchanged.compiled) == 1

    def test_an_engine_that_misses_its_tolerance_is_not_saved(self, store, unchanged, monkeypatch):
        monkeypatch.setitem(engines.TOLERANCE, ("forward", "float32"), Tolerance(1e-12))
        with pytest.raises(EngineError, match="decode in unchanged, up to 12 rows is not saved: against float64 its"):
            build(decode(), "unchanged", store)
        assert not store.list() and store.find(spec_of(decode(), "unchanged")) is None

    def test_outputs_are_what_is_declared(self, store, unchanged):
        wrong = decode(outputs=(TensorSpec("result", (None, 3, 8, 8), "float32"),))
        with pytest.raises(EngineError, match=r"decode gives result: float32 \[B, 3, 4, 4\]: .*\[B, 3, 8, 8\]"):
            build(wrong, "unchanged", store)

    @pytest.mark.parametrize(
        "function, backend, targets, said",
        [
            (decode(dtype="bfloat16"), "unchanged", (), "cannot be built: it is out of order"),
            (decode(), "unchanged", ("sm_89",), "unchanged compiles for the machine that it is on, not for sm_89"),
            (decode(), "unchanged", ("L4",), "the target 'L4' is unknown"),
            (decode(quantise="int8"), "inductor", (), "decode int8 in inductor, .*8 bits are those of onnxruntime"),
            (decode(), "tvm", (), "the backend 'tvm' is unknown"),
        ],
    )
    def test_what_cannot_be_built(self, store, unchanged, function, backend, targets, said):
        with pytest.raises(EngineError, match=said):
            build(function, backend, store, targets=targets)
        assert not store.root.exists()

    def test_eager_is_timed_as_a_run_without_engines_is(self, store, unchanged):
        """With kernels of its own that no graph holds; the judge's is the plain call."""
        calls = []
        function = decode()
        own = replace(function, eager=lambda x: calls.append(len(x)) or function.call(x))
        build(own, "unchanged", store)
        assert calls == [6] * (engines.TIMED_TURNS + 1)


def test_a_network_with_xformers_is_traced_with_torchs_attention():
    """Whether that is installed or not; the network has it again afterwards."""
    with torch.random.fork_rng(devices=[]):
        layer = Attention(query_dim=4, heads=2, dim_head=2).eval().requires_grad_(False)
    network = ModuleList([layer])
    network.attn_processors = {"0.processor": XFormersAttnProcessor()}
    network.set_attn_processor = lambda given: layer.set_processor(
        given["0.processor"] if isinstance(given, dict) else given
    )
    network.set_attn_processor(network.attn_processors)
    row = TensorSpec("row", (None, 3, 4), "float32")
    function = decode(
        call=lambda row: (network[0](row),), inputs=(row,), outputs=(replace(row, name="result"),), networks=(network,)
    )
    x = torch.randn(5, 3, 4)
    (got,) = engines._traced(function, "torch")(x)
    assert type(layer.processor) is XFormersAttnProcessor
    layer.set_processor(AttnProcessor2_0())
    torch.testing.assert_close(got, layer(x))


class TestOwnBackend:
    def test_a_backend_is_a_class_in_a_file(self, store, tmp_path):
        file = tmp_path / "own.py"
        file.write_text(BACKEND_FILE)
        name = f"{file}:Program"
        state, manifest = build(decode(), name, store)
        assert state == "built" and manifest.spec.backend == "program"
        (x,) = decode().samples(5, 0)
        engine = load(store, manifest.key, "cpu", engines.backend_of(name))
        torch.testing.assert_close(engine(x), decode().call(x))
        # its code is in the key
        other = tmp_path / "other.py"
        other.write_text(BACKEND_FILE.replace("to_program(graph)", "to_program(graph, 4)"))
        assert spec_of(decode(), f"{other}:Program").key() != manifest.key == spec_of(decode(), name).key()

    def test_an_unknown_one(self, tmp_path):
        with pytest.raises(UsageError, match="no file"):
            engines.backend_of(f"{tmp_path}/none.py:Program")


class TestGroupNorms:
    """Inductor on a GPU: compiled with torch's and with the kernel's, and the quicker is kept."""

    @pytest.fixture
    def inductor(self, monkeypatch):
        """In inductor's place, on a CPU that says it is a GPU."""
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("the kernel is not interpreted here")
        backend = Unchanged("inductor")
        monkeypatch.setitem(BACKENDS, "inductor", backend)
        monkeypatch.setattr(engines, "architecture", lambda device: GPU)
        return backend

    def test_both_are_built_and_the_quicker_is_kept_and_judged(self, store, inductor):
        function = decode(rows=2, largest=2)
        _, manifest = build(function, "inductor", store)
        plain, fused = inductor.compiled
        used = [bool(KERNELS & {node.target for node in graph.module.graph.nodes}) for graph in (plain, fused)]
        assert used == [False, True]
        measured = manifest.facts["group_norm"]
        assert measured["kept"] == min(measured["milliseconds"], key=measured["milliseconds"].get)
        assert set(measured["milliseconds"]) == {"torch", "triton"}
        payload = store.payload(manifest)
        assert [file.name for file in payload.iterdir()] == ["engine"]
        assert (payload / "engine").read_text() == {"torch": "0", "triton": "1"}[measured["kept"]]
        assert manifest.facts["parity"]["relative"] < 1e-5

    @pytest.mark.parametrize("kernels, fused", [("torch", 0), ("triton", 1)])
    def test_eager_is_timed_with_the_kernels_of_its_run(self, store, unchanged, kernels, fused):
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("the kernel is not interpreted here")
        seen = []
        function = decode(rows=2)
        network = function.networks[0]
        own = replace(function, eager=lambda x: seen.append(group_norms(network).fused) or function.call(x))
        _, manifest = build(own, "unchanged", store, kernels=kernels)
        assert set(seen) == {fused} and manifest.facts["milliseconds"]["kernels"] == kernels
        assert group_norms(network).fused == 0  # as it was before


class TestAheadOfTime:
    """Compiled for GPUs that are not here, and taken over on a machine with one."""

    @pytest.fixture
    def rtx(self, monkeypatch):
        backend = Unchanged("rtx", fixed_rows=True, targets=("sm_80", "sm_89"))
        monkeypatch.setitem(BACKENDS, "rtx", backend)
        return backend

    def test_a_machine_with_such_a_gpu_takes_it_over(self, store, rtx, monkeypatch):
        _, ahead = build(decode(), "rtx", store, targets=("sm_89", "sm_80"))
        assert ahead.spec.device == family(("sm_80", "sm_89")) and ahead.facts.keys() == {"compile_seconds"}
        monkeypatch.setattr(engines, "architecture", lambda device: GPU)
        state, own = build(decode(), "rtx", store)
        assert state == "built" and len(rtx.compiled) == 1  # nothing was compiled
        assert own.facts["compiled_ahead"] == ahead.key and own.spec == replace(ahead.spec, device=GPU)
        assert own.facts["parity"]["relative"] < 1e-5 and own.facts["milliseconds"]["rows"] == 6

    @pytest.mark.parametrize("targets, seed", [(("sm_80",), 0), (("sm_89",), 1)])
    def test_but_nothing_for_other_gpus_or_of_other_weights(self, store, rtx, monkeypatch, targets, seed):
        build(decode(seed), "rtx", store, targets=targets)
        monkeypatch.setattr(engines, "architecture", lambda device: GPU)
        _, own = build(decode(), "rtx", store)
        assert "compiled_ahead" not in own.facts and len(rtx.compiled) == 2


def test_a_backend_that_runs_in_several_ways_is_tuned(store, monkeypatch):
    @dataclass
    class Tuned(Unchanged):
        def __post_init__(self):
            super().__init__("tuned")

        def tune(self, folder, spec, device, arguments):
            (folder / "way").write_text("quick")
            return {"slow": float(len(arguments[0])), "quick": 1.0}

    monkeypatch.setitem(BACKENDS, "tuned", Tuned())
    _, manifest = build(decode(), "tuned", store)
    assert manifest.facts["ways"] == {"slow": 6.0, "quick": 1.0} and "way" in manifest.files


def test_reasons_are_short():
    there, here = "0" * 64, "1" * 64
    assert reasons([("components.vae", there, here)]) == ["components.vae was 000000000000 and is 111111111111"]
    assert reasons([("rows.largest", "6", "8")]) == ["rows.largest was 6 and is 8"]
    assert reasons([("network", "(absent)", "unet")]) == ["it was not built yet"]
    assert reasons([("backend", "a", "b"), ("flags.x", "1", "2")]) == ["it was not built with this backend yet"]
    assert reasons([("engine", "model.onnx was altered", "k")]) == ["it is damaged: model.onnx was altered"]


@pytest.mark.slow
@pytest.mark.skipif(BACKENDS["inductor"].unusable("cpu") is not None, reason="inductor cannot be used here")
def test_inductor_on_the_cpu(store):
    state, manifest = build(decode(), "inductor", store)
    assert state == "built" and manifest.facts["parity"]["relative"] < 1e-4
    flip_a_byte(store, manifest.key)
    with pytest.raises(EngineError, match="is damaged"):
        load(store, manifest.key, "cpu")
