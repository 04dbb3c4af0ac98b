"""One contract for every backend that this machine can run: the float64 result, for any batch, and nothing shared.

Each pair of backend and network is compiled once; inductor takes most of the time.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from dfkd_engine.backends import BACKENDS, compile_graph, get
from dfkd_engine.backends import inductor as inductor_module
from dfkd_engine.backends import onnxruntime as onnxruntime_module
from dfkd_engine.backends.inductor import PACKAGE
from dfkd_engine.backends.onnxruntime import MODEL
from dfkd_engine.compiled import Engine
from dfkd_engine.devices import architecture
from dfkd_engine.errors import EngineError, compiler_line
from dfkd_engine.graph import trace
from dfkd_engine.parity import TOLERANCE, measure
from tests.engine.small_graphs import INPUTS, KINDS, OUTPUTS, ROWS, arguments, graph, networks, spec

ROOT = Path(__file__).resolve().parents[2]
USABLE = [name for name, backend in BACKENDS.items() if backend.unusable("cpu") is None]


# Compiling takes seconds to half a minute; the gradient has the layers of the others too, but for the text's.
EVERY = [(backend, network) for backend in USABLE for network in ("gradient", "unet")]
EVERY = [pair for pair in EVERY if pair != ("inductor", "unet")]


@pytest.fixture(scope="module")
def payload(tmp_path_factory):
    """(backend, network) -> the folder of its compiled files, compiled once."""
    made: dict[tuple[str, str], Path] = {}

    def get_payload(backend, network):
        if (backend, network) not in made:
            folder = tmp_path_factory.mktemp(f"{backend}-{network}")
            compile_graph(BACKENDS[backend], graph(network), spec(network, backend), folder)
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
            made[backend, network] = Engine(own, BACKENDS[backend].load(payload(backend, network), own, "cpu"))
        return made[backend, network]

    return get_engine


@pytest.mark.parametrize("backend, network", EVERY)
def test_parity_with_float64(engines, backend, network):
    """Batches of one, three, the planned and a remainder; per sample, as the store's engines are judged."""
    exact, eager = networks().to("cpu", torch.float64).function(network), networks().function(network)
    batches = [arguments(network, rows, seed) for seed, rows in enumerate((1, 3, ROWS[1], 2, ROWS[2]))]
    parity = measure(engines(backend, network), exact, eager, batches, KINDS[network])
    assert parity.problem(TOLERANCE[KINDS[network], "float32"]) is None, parity
    assert parity.samples + parity.kinks == 16


@pytest.mark.parametrize("backend, network", EVERY)
def test_calls(engines, backend, network):
    """A row does not depend on its batch, nor a result on strides, on earlier calls, or on who holds what."""
    engine, given, other = engines(backend, network), arguments(network, 3, 1), arguments(network, 3, 2)
    before = [x.clone() for x in given]
    first = engine(*given)
    kept = [x.clone() for x in first]
    second = engine(*other)
    assert not torch.equal(first[0], second[0]) and not any(x.requires_grad for x in first)
    assert all(torch.equal(a, b) for a, b in zip((*first, *given), (*kept, *before), strict=True))
    tensors = [*first, *second, *given, *other]
    assert len({x.untyped_storage().data_ptr() for x in tensors}) == len(tensors)

    last = [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in given]
    sliced = [torch.stack([x, x], 1)[:, 0] for x in given]
    shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].reshape(x.shape) for x in given]  # off the vector grid
    for arranged in (given, last, sliced, shifted):
        assert all(torch.equal(a, b) for a, b in zip(engine(*arranged), first, strict=True))
    alone = engine(*(x[:1] if wanted.batched else x for x, wanted in zip(given, INPUTS[network], strict=True)))
    for one, of_three in zip(alone, first, strict=True):
        torch.testing.assert_close(one, of_three[:1], rtol=1e-5, atol=1e-5)  # other blocking of the same sums


@pytest.mark.parametrize("backend", USABLE)
def test_an_engine_runs_in_a_fresh_process_with_other_threads(engines, payload, backend, tmp_path):
    """Weights and all are in the payload: the process knows neither the graph nor the builder's caches."""
    own, given = spec("gradient", backend), arguments("gradient", 3)
    want = engines(backend, "gradient")(*given)[0]
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
got = Engine(spec, get(spec.backend).load(Path({str(payload(backend, "gradient"))!r}), spec, "cpu"))(*given)[0]
print(((got - want).norm() / want.norm()).item())
"""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-6  # threads share out sums otherwise


@pytest.mark.parametrize("backend", USABLE)
def test_a_payload_holds_no_pickle_and_no_scratch(payload, backend):
    files = [file for file in payload(backend, "gradient").rglob("*") if file.is_file()]
    assert [file.name for file in files] == [PACKAGE if backend == "inductor" else MODEL]
    if backend == "inductor":
        names = zipfile.ZipFile(files[0]).namelist()
        assert any(name.endswith(".so") for name in names)
        assert not [name for name in names if name.endswith((".pt", ".pth", ".pkl", ".bin"))]


@pytest.mark.parametrize("backend", USABLE)
def test_a_broken_payload_is_refused_by_name(backend, tmp_path):
    own = spec("decode", backend)
    for name in (PACKAGE, MODEL):
        (tmp_path / name).write_bytes(b"nothing that can be run")
    with pytest.raises(EngineError, match=f"decode {own.key()} cannot be loaded.*dfkd-engines build"):
        get(backend).load(tmp_path, own, "cpu")


def test_inductor_says_what_it_misses(monkeypatch):
    backend = get("inductor")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "finds no no-such-compiler" in backend.unusable("cpu")
    monkeypatch.setenv("CXX", "false")
    assert "false --version ends with status 1" in backend.unusable("cpu")
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(inductor_module, "missing", lambda name: [name])
    assert backend.unusable("cpu") is None and "needs triton" in backend.unusable("cuda:0")


def of_torch(output):
    """As torch words a C++ compiler's failure, behind the type that it wraps."""
    return RuntimeError(f"CppCompileError: C++ compile error\n\nCommand:\ng++ main.cpp -o main.so\n\nOutput:\n{output}")


@pytest.mark.parametrize(
    "error, line",
    [
        (of_torch("In file included from a.h:1:\na.h:9:2: error: no y\na.h:9: note: x\n"), "a.h:9:2: error: no y"),
        (of_torch("/usr/bin/ld: cannot find -lgomp: No such file\ncollect2: error: ld returned 1 exit status\n"),
         "/usr/bin/ld: cannot find -lgomp: No such file"),
        (of_torch("Killed.\n"), "Killed"),
        (of_torch(""), "g++ ended with an error and without a word"),
        (KeyError("no such op"), "KeyError: 'no such op'"),
        (RuntimeError("LoweringException: no kernel\ntarget: x"), "LoweringException: no kernel"),
    ],
)  # fmt: skip
def test_the_line_of_a_compiler_that_says_what_is_wrong(error, line):
    assert compiler_line(error) == line


def test_onnxruntime_says_what_it_misses(monkeypatch):
    backend = get("onnxruntime")
    monkeypatch.setattr(onnxruntime_module, "missing", lambda *names: ["onnxscript"])
    assert backend.unusable("cpu") == "onnxscript is not installed (pip install 'dfkd[onnx]')"
    monkeypatch.setattr(onnxruntime_module, "missing", lambda *names: [])
    assert "opset 22" in backend.unusable("cpu", "bfloat16") and "not on mps" in backend.unusable("mps")
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "comes without CUDAExecutionProvider (pip install onnxruntime-gpu" in backend.unusable("cuda")


@pytest.mark.skipif("onnxruntime" not in USABLE, reason="needs the extra onnx")
def test_onnxruntime_short_of_memory_is_torchs_error(tmp_path):
    """A model that wants 2^44 bytes between its input and its output."""
    import onnx

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


def test_names_flags_and_versions():
    for name, backend in BACKENDS.items():
        assert backend.name == name
        # a plan is the same whatever CUDA torch was built for; code that torch compiles is not
        own = torch.__version__.partition("+")[0] if name.startswith("tensorrt") else torch.__version__
        assert backend.versions()["torch"] == own
        assert all(isinstance(value, str) for value in backend.flags("cpu").values())


@pytest.mark.gpu
@pytest.mark.parametrize("network", INPUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity_on_a_gpu(backend, network, tmp_path, monkeypatch):
    if (why := get(backend).unusable("cuda")) is not None:
        pytest.skip(why)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # float32 is to be judged, not ten bits of it
    own, names = networks().to("cuda", torch.float32), [output.name for output in OUTPUTS[network]]
    traced = trace(own.function(network), INPUTS[network], output_names=names, device="cuda")
    its = spec(network, backend, architecture("cuda"))
    compile_graph(get(backend), traced, its, tmp_path)
    engine = Engine(its, get(backend).load(tmp_path, its, "cuda"), "cuda")
    exact = networks().to("cuda", torch.float64).function(network)
    batches = [tuple(x.cuda() for x in arguments(network, rows, rows)) for rows in (1, 3, 4, 6)]
    parity = measure(engine, exact, own.function(network), batches, KINDS[network])
    assert parity.problem(TOLERANCE[KINDS[network], "float32"]) is None, parity
