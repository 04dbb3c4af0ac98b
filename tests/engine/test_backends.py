"""One contract for every backend that this machine can run: the float64 result, for any batch, and nothing shared.

Each pair of backend and network is compiled once; inductor takes most of the suite's time.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from dfkd_engine.backends import BACKENDS, get
from dfkd_engine.backends import inductor as inductor_module
from dfkd_engine.backends import onnxruntime as onnxruntime_module
from dfkd_engine.backends.inductor import PACKAGE, jit
from dfkd_engine.backends.onnxruntime import MODEL
from dfkd_engine.compiled import Engine
from dfkd_engine.errors import EngineError
from dfkd_engine.parity import TOLERANCE, measure
from tests.engine.small_graphs import BATCH, INPUTS, KINDS, arguments, graph, networks, spec

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = list(INPUTS)
USABLE = [name for name, backend in BACKENDS.items() if backend.unusable("cpu") is None]
SLOW = {"inductor"}  # half a minute of compiling for each network


def each(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


STORED = each(name for name in USABLE if BACKENDS[name].stored)


@pytest.fixture(scope="module")
def payload(tmp_path_factory):
    """(backend, network) -> the folder of its compiled files, compiled once."""
    made: dict[tuple[str, str], Path] = {}

    def get_payload(backend, network):
        if (backend, network) not in made:
            folder = tmp_path_factory.mktemp(f"{backend}-{network}")
            BACKENDS[backend].compile(graph(network), spec(network, backend), folder)
            made[backend, network] = folder
        return made[backend, network]

    return get_payload


@pytest.fixture(scope="module")
def engines(payload):
    """(backend, network) -> its engine, loaded once."""
    made: dict[tuple[str, str], Engine] = {}

    def get_engine(backend, network):
        if (backend, network) not in made:
            own = spec(network, backend)
            stored = BACKENDS[backend].stored
            run = BACKENDS[backend].load(payload(backend, network), own, "cpu") if stored else graph(network)
            made[backend, network] = Engine(own, run)
        return made[backend, network]

    return get_engine


def test_this_machine_runs_more_than_eager():
    assert "eager" in USABLE
    for name in set(BACKENDS) - set(USABLE):
        print(f"not tested: {name}: {BACKENDS[name].unusable('cpu')}")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("backend", each(USABLE))
class TestContract:
    def test_parity_with_float64(self, engines, backend, network):
        """Batches of one, three, the planned and a remainder; per sample, as the store's engines are judged."""
        exact, eager = networks().to("cpu", torch.float64).function(network), networks().function(network)
        batches = [arguments(network, rows, seed) for seed, rows in enumerate((1, 3, BATCH[1], 2, BATCH[2]))]
        parity = measure(engines(backend, network), exact, eager, batches, KINDS[network])
        assert parity.problem(TOLERANCE[KINDS[network], "float32"]) is None, parity
        assert parity.samples + parity.kinks == 16

    def test_a_row_does_not_depend_on_its_batch(self, engines, backend, network):
        engine, given = engines(backend, network), arguments(network, 3)
        alone = engine(
            *(x[:1] if wanted.shape[0] is None else x for x, wanted in zip(given, INPUTS[network], strict=True))
        )
        for one, of_three in zip(alone, engine(*given), strict=True):
            assert len(one) == 1
            torch.testing.assert_close(one, of_three[:1], rtol=1e-5, atol=1e-5)  # other blocking of the same sums

    def test_results_are_the_callers(self, engines, backend, network):
        engine = engines(backend, network)
        given = arguments(network, 4, 1), arguments(network, 4, 2)
        before = [x.clone() for x in given[0]]
        first = engine(*given[0])
        kept = [x.clone() for x in first]
        second = engine(*given[1])
        assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(given[0], before, strict=True))
        assert not torch.equal(first[0], second[0])
        tensors = [*first, *second, *given[0], *given[1]]
        assert len({x.untyped_storage().data_ptr() for x in tensors}) == len(tensors)
        assert not any(x.requires_grad for x in first)

    def test_the_same_call_gives_the_same_bits(self, engines, backend, network):
        engine, given = engines(backend, network), arguments(network, 3)
        assert all(torch.equal(a, b) for a, b in zip(engine(*given), engine(*given), strict=True))

    def test_out(self, engines, backend, network):
        engine = engines(backend, network)
        for rows in (1, 3):
            given = arguments(network, rows)
            want = engine(*given)
            out = tuple(torch.full_like(x, 7) for x in want)
            assert engine(*given, out=out)[0] is out[0]
            assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))

    def test_strides_do_not_matter(self, engines, backend, network):
        engine, given = engines(backend, network), arguments(network, 4)
        want = engine(*given)
        last = [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in given]
        sliced = [torch.stack([x, x], 1)[:, 0] for x in given]
        shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].reshape(x.shape) for x in given]  # off the vector grid
        for other in (last, sliced, shifted):
            assert all(torch.equal(a, b) for a, b in zip(engine(*other), want, strict=True))

    def test_wrong_arguments_are_refused_by_name(self, engines, backend, network):
        engine, given = engines(backend, network), arguments(network, 3)
        with pytest.raises(TypeError, match=f"got {len(given) + 1} arguments; it wants {len(given)}: z: float32"):
            engine(*given, given[0])
        with pytest.raises(TypeError, match="z is float64; wanted is float32"):
            engine(given[0].double(), *given[1:])
        with pytest.raises(ValueError, match=r"z has shape \[3, 4, 4, 3\]; wanted is \[B, 4, 4, 4\]"):
            engine(given[0][..., :3], *given[1:])
        with pytest.raises(ValueError, match="z has 7 rows; this engine takes 1 to 6 at a time"):
            engine(*arguments(network, BATCH[2] + 1))
        with pytest.raises(TypeError, match="z requires a gradient"):
            engine(given[0].clone().requires_grad_(), *given[1:])


@pytest.mark.parametrize("backend", STORED)
def test_an_engine_runs_in_a_fresh_process_with_other_threads(engines, payload, backend, tmp_path):
    """Weights and all are in the payload: the process knows neither the graph nor the builder's caches."""
    own, given = spec("decode", backend), arguments("decode", 3)
    want = engines(backend, "decode")(*given)[0]
    torch.save((given, want), tmp_path / "given.pt")
    (tmp_path / "spec.json").write_text(json.dumps(own.to_json()))
    script = f"""
import json, sys, torch
from pathlib import Path
from dfkd_engine.backends import get
from dfkd_engine.compiled import Engine
from dfkd_engine.spec import EngineSpec
assert "diffusers" not in sys.modules
torch.set_num_threads({torch.get_num_threads() + 1})
spec = EngineSpec.from_json(json.loads(Path({str(tmp_path / "spec.json")!r}).read_text()))
given, want = torch.load({str(tmp_path / "given.pt")!r})
got = Engine(spec, get(spec.backend).load(Path({str(payload(backend, "decode"))!r}), spec, "cpu"))(*given)[0]
print(((got - want).norm() / want.norm()).item())
"""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-6  # threads share out sums otherwise
    # nothing of the engine is compiled again; torch itself probes the CPU's vector instructions, a small file for each
    probe = "from torch._inductor.cpu_vec_isa import valid_vec_isa_list; valid_vec_isa_list()"
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "probes")
    subprocess.run([sys.executable, "-c", probe], cwd=ROOT, env=environment, check=True, capture_output=True)
    compiled, probes = (
        {file.stem for file in (tmp_path / name).rglob("*") if file.suffix in (".cpp", ".so", ".o")}
        for name in ("cache", "probes")
    )
    assert compiled <= probes, compiled - probes


@pytest.mark.parametrize("backend", STORED)
def test_a_payload_holds_no_pickle_and_no_scratch(payload, backend):
    files = [file for file in payload(backend, "decode").rglob("*") if file.is_file()]
    assert [file.name for file in files] == [PACKAGE if backend == "inductor" else MODEL]
    if backend == "inductor":
        names = zipfile.ZipFile(files[0]).namelist()
        assert any(name.endswith(".so") for name in names)
        assert not [name for name in names if name.endswith((".pt", ".pth", ".pkl", ".bin"))]


@pytest.mark.parametrize("backend", STORED)
def test_a_broken_payload_is_refused_by_name(backend, tmp_path):
    own = spec("decode", backend)
    for name in (PACKAGE, MODEL):
        (tmp_path / name).write_bytes(b"nothing that can be run")
    with pytest.raises(EngineError, match=f"decode {own.key()} cannot be loaded.*dfkd-engines build"):
        get(backend).load(tmp_path, own, "cpu")


def test_eager_has_no_files(tmp_path):
    own = spec("decode", "eager")
    for call in (
        lambda: get("eager").compile(graph("decode"), own, tmp_path),
        lambda: get("eager").load(tmp_path, own, "cpu"),
    ):
        with pytest.raises(EngineError, match="decode cannot be stored"):
            call()


def test_an_unknown_backend_names_the_known():
    with pytest.raises(EngineError, match="'tvm' is unknown: known are eager, inductor, onnxruntime, tensorrt"):
        get("tvm")


def test_inductor_says_what_it_misses(monkeypatch, tmp_path):
    backend = get("inductor")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "finds no no-such-compiler" in backend.unusable("cpu")
    with pytest.raises(EngineError, match="cannot be compiled by inductor: it needs a C"):
        backend.compile(graph("decode"), spec("decode", "inductor"), tmp_path)
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(inductor_module, "missing", lambda name: [name])
    assert backend.unusable("cpu") is None and "needs triton" in backend.unusable("cuda:0")


def test_onnxruntime_says_what_it_misses(monkeypatch):
    backend = get("onnxruntime")
    monkeypatch.setattr(onnxruntime_module, "missing", lambda *names: ["onnxscript"])
    assert backend.unusable("cpu") == "onnxscript is not installed (pip install 'dfkd[onnx]')"
    monkeypatch.setattr(onnxruntime_module, "missing", lambda *names: [])
    assert "opset 22" in backend.unusable("cpu", "bfloat16")
    assert "not on mps" in backend.unusable("mps")


@pytest.mark.skipif("onnxruntime" not in USABLE, reason="needs the extra onnx")
def test_onnxruntime_short_of_memory_is_torchs_error(tmp_path):
    """A model that wants 2^44 bytes between its input and its output."""
    onnx = pytest.importorskip("onnx")
    h, own = onnx.helper, spec("decode", "onnxruntime")
    wide = h.make_tensor("wide", onnx.TensorProto.INT64, [1], [2**42])
    nodes = [
        h.make_node("Constant", [], ["size"], value=wide),
        h.make_node("ConstantOfShape", ["size"], ["zeros"]),
        h.make_node("ReduceSum", ["zeros"], ["zero"], keepdims=0),
        h.make_node("Add", [own.inputs[0].name, "zero"], [own.outputs[0].name]),
    ]
    ends = [[h.make_tensor_value_info(tensor.name, onnx.TensorProto.FLOAT, ["n", *tensor.shape[1:]])]
            for tensor in (own.inputs[0], own.outputs[0])]  # fmt: skip
    model = h.make_model(h.make_graph(nodes, "wide", *ends), opset_imports=[h.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / MODEL)
    run = get("onnxruntime").load(tmp_path, own, "cpu")
    with pytest.raises(torch.OutOfMemoryError, match="decode: Failed to allocate memory for requested buffer of size"):
        run(*arguments("decode", 1))


@pytest.mark.skipif("onnxruntime" not in USABLE, reason="needs the extra onnx")
def test_onnxruntime_does_not_fall_back_to_the_cpu(payload):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    own = spec("decode", "onnxruntime")
    with pytest.raises(EngineError, match=r"comes without CUDAExecutionProvider \(pip install onnxruntime-gpu"):
        get("onnxruntime").load(payload("onnxruntime", "decode"), own, "cuda")


def test_names_flags_and_versions():
    for name, backend in BACKENDS.items():
        assert backend.name == name
        # a plan is the same whatever CUDA torch was built for; code that torch compiles is not
        own = torch.__version__.partition("+")[0] if name.startswith("tensorrt") else torch.__version__
        assert backend.versions()["torch"] == own
        assert all(isinstance(value, str) for value in backend.flags("cpu").values())
    assert get("inductor").flags("cpu")["max_autotune"] == "False"


@pytest.mark.skipif("inductor" not in USABLE, reason="needs a C++ compiler")
def test_jit_reads_weights_anew_and_keeps_the_batch_free():
    from torch._dynamo.utils import counters

    from dfkd_engine.graph import trace
    from dfkd_engine.spec import TensorSpec

    layer = torch.nn.Linear(4, 3).requires_grad_(False)
    traced = trace(lambda x: torch.relu(layer(x)), [TensorSpec("x", (None, 4), "float32")])
    run = jit(traced)
    counters.clear()
    for rows in (2, 5, 3):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(run(x)[0], torch.relu(layer(x)))
    with torch.no_grad():
        for weight in traced.module.buffers():
            weight.mul_(2)
    assert torch.allclose(run(x)[0], traced(x)[0])
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
def test_parity_on_a_gpu(backend, network, tmp_path, monkeypatch):
    from dfkd_engine.architecture import architecture
    from dfkd_engine.graph import trace
    from tests.engine.small_graphs import OUTPUTS

    if (why := get(backend).unusable("cuda")) is not None:
        pytest.skip(why)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # float32 is to be judged, not ten bits of it
    own = networks().to("cuda", torch.float32)
    traced = trace(own.function(network), INPUTS[network], output_names=OUTPUTS[network], device="cuda")
    its = spec(network, backend, architecture("cuda"))
    get(backend).compile(traced, its, tmp_path)
    engine = Engine(its, get(backend).load(tmp_path, its, "cuda"), "cuda")
    exact = networks().to("cuda", torch.float64).function(network)
    batches = [tuple(x.cuda() for x in arguments(network, rows, rows)) for rows in (1, 3, 4, 6)]
    parity = measure(engine, exact, own.function(network), batches, KINDS[network])
    assert parity.problem(TOLERANCE[KINDS[network], "float32"]) is None, parity
