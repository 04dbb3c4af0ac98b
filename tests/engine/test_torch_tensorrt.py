"""The backend torch-tensorrt without a GPU: what it is told, what it refuses, what it writes and how that is loaded.

A stand-in takes the place of the package, with the names that the wheel of 2.13.0 has. On a GPU the contract of
test_backends.py runs over the real one.
"""

import ast
import inspect
import sys
from dataclasses import field, make_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dfkd_engine.backends import compile_graph, get
from dfkd_engine.backends import torch_tensorrt as module
from dfkd_engine.backends.torch_tensorrt import BINDINGS, OPTIONS, PLAN
from dfkd_engine.errors import EngineError
from tests.engine.small_graphs import arguments, graph, spec

# Of the function that converts and of CompilationSettings both, in 2.11 to 2.14; 2.11 and 2.12 have TYPING beside them.
SHARED = [
    "device", "disable_tf32", "assume_dynamic_shape_support", "sparse_weights", "engine_capability",
    "num_avg_timing_iters", "workspace_size", "dla_sram_size", "dla_local_dram_size", "dla_global_dram_size",
    "truncate_double", "require_full_compilation", "min_block_size", "torch_executed_ops",
    "pass_through_build_failures", "max_aux_streams", "version_compatible", "optimization_level",
    "use_fast_partitioner", "enable_experimental_decompositions", "dryrun", "hardware_compatible",
    "timing_cache_path", "lazy_engine_init", "cache_built_engines", "reuse_cached_engines", "use_fp32_acc",
    "refit_identical_engine_weights", "strip_engine_weights", "immutable_weights", "enable_weight_streaming",
    "tiling_optimization_level", "l2_limit_for_tiling", "offload_module_to_cpu", "use_distributed_mode_trace",
    "decompose_attention", "attn_bias_is_causal",
]  # fmt: skip
TYPING = ["enabled_precisions", "use_explicit_typing"]
OF_THE_CALL = ["exported_program", "inputs"]
LINGERING = ["use_python_runtime"]  # 2.13 takes it and does nothing
GPU = "cuda sm_90 H100"
CONVERT = "convert_exported_program_to_serialized_trt_engine"


class StandIn(ModuleType):
    """A torch_tensorrt whose plans are eight bytes, and whose engines run a graph of ours.

    call: what its function was called with last. loaded: what its engine was made of.
    """

    def __init__(self, release="2.13.0", named=SHARED, fields=SHARED, fails=None, runs=None):
        super().__init__("torch_tensorrt")
        self.__version__, self.fails, self.runs = release, fails, runs
        self.call, self.loaded = None, None
        self.Input = SimpleNamespace
        self.Device = lambda gpu_id: f"gpu {gpu_id}"
        kinds = inspect.Parameter
        parameters = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in OF_THE_CALL]
        parameters += [kinds(name, kinds.KEYWORD_ONLY, default=None) for name in [*named, *LINGERING]]

        def convert(program, inputs, **options):
            self.call = SimpleNamespace(program=program, inputs=inputs, options=options)
            Path(options["timing_cache_path"]).write_bytes(b"as TensorRT leaves one")
            if self.fails:
                raise self.fails
            return b"the plan"

        convert.__signature__ = inspect.Signature([*parameters, kinds("kwargs", kinds.VAR_KEYWORD)])
        settings = make_dataclass("CompilationSettings", [(name, object, field(default=None)) for name in fields])
        self.dynamo = SimpleNamespace(**{CONVERT: convert}, CompilationSettings=settings)
        self.runtime = SimpleNamespace(TorchTensorRTModule=self.engine)

    def engine(self, plan, inputs, outputs, *, name, settings):
        if plan != b"the plan":
            raise RuntimeError("magic tag does not match\nand more")
        self.loaded = SimpleNamespace(inputs=inputs, outputs=outputs, device=settings.device, unowned=False)

        def run(*tensors):
            results = self.runs(*tensors)
            return results[0] if len(results) == 1 else list(results)

        run.set_output_tensors_as_unowned = lambda value: setattr(self.loaded, "unowned", value)
        return run


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU and the packages, by what is asked of it; returns how to change what is installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def install(stand_in=None, absent=(), torch="2.13.0+cu130", its="2.13.0"):
        installed = {"torch": torch, "torch-tensorrt": its}
        monkeypatch.setattr(module, "missing", lambda *names: [name for name in names if name in absent])
        monkeypatch.setattr(module, "versions", lambda *names: {n: installed[n] for n in names if n in installed})
        if stand_in is not None:
            monkeypatch.setitem(sys.modules, "torch_tensorrt", stand_in)
        return stand_in

    return install


def compiled(stand_in, folder, network="unet"):
    compile_graph(get("torch-tensorrt"), graph(network), spec(network, "torch-tensorrt", GPU), folder)
    return stand_in.call


def test_it_says_what_it_misses(machine, monkeypatch, tmp_path):
    unusable = get("torch-tensorrt").unusable
    machine(StandIn())
    assert unusable("cpu") == "it runs on cuda, not on cpu"
    assert "compiles for no other" in unusable("cuda sm_89")
    assert unusable("cuda:1") is None and unusable("cuda sm_90 NVIDIA H100") is None
    machine(absent={"torch_tensorrt"})
    assert unusable("cuda") == "torch_tensorrt is not installed (pip install 'dfkd[tensorrt]')"
    machine(torch="2.13.0+cu130", its="2.14.0")
    want = "torch-tensorrt 2.14.0 wants torch 2.14, here is 2.13.0+cu130 (pip install 'torch-tensorrt==2.13.*')"
    assert unusable("cuda") == want
    machine(torch="2.14.1", its="2.14.0")
    assert unusable("cuda") is None

    # its import fails without a driver, so it must not be imported to find out
    (tmp_path / "torch_tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    machine()
    with pytest.raises(EngineError, match=r"does not load \(libnvinfer.so.11: cannot open\)"):
        compiled(None, tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unusable("cuda") == "torch finds no CUDA device"


def test_what_is_passed(machine, tmp_path):
    call = compiled(machine(StandIn()), tmp_path)
    z, t, context = call.inputs
    assert (z.min_shape, z.opt_shape, z.max_shape) == ([2, 4, 4, 4], [4, 4, 4, 4], [6, 4, 4, 4])
    assert (context.min_shape, context.opt_shape, context.max_shape) == ([2, 5, 8], [4, 5, 8], [6, 5, 8])
    assert t.shape == [1] and not hasattr(t, "min_shape")
    assert {x.dtype for x in call.inputs} == {torch.float32}
    given = dict(call.options)
    assert given.pop("device") == "gpu 0" and Path(given.pop("timing_cache_path")).parent == tmp_path
    assert given == OPTIONS and given["disable_tf32"] is given["immutable_weights"] is True
    assert get("torch-tensorrt").flags("cuda").keys() == OPTIONS.keys() | {"use_explicit_typing"}

    one = replace(spec("gradient", "torch-tensorrt", GPU), rows=(1, 1, 1))
    get("torch-tensorrt").compile(graph("gradient"), one, tmp_path)
    z, labels = machine(sys.modules["torch_tensorrt"]).call.inputs
    assert z.min_shape == z.opt_shape == z.max_shape == [2, 4, 4, 4] and labels.dtype == torch.int64  # one row is two


def test_typing_is_strong_where_it_could_be_weak(machine, tmp_path):
    own = StandIn("2.11.0", [*SHARED, *TYPING], [*SHARED, *TYPING])
    machine(own, torch="2.11.0", its="2.11.0")
    assert compiled(own, tmp_path).options["use_explicit_typing"] is True


def test_an_option_that_does_nothing_is_named_with_the_version(machine, tmp_path, monkeypatch):
    rest = [other for other in SHARED if other != "disable_tf32"]
    for named, fields in ((rest, rest), (SHARED, rest), (rest, SHARED)):
        own = machine(StandIn("2.15.0", named, fields), torch="2.15.0", its="2.15.0")
        with pytest.raises(EngineError, match=r"torch-tensorrt 2.15.0 cannot be told disable_tf32: .*2.11 to 2.14"):
            compiled(own, tmp_path)
        assert own.call is None and not list(tmp_path.iterdir())
    monkeypatch.setitem(OPTIONS, "use_python_runtime", 5)
    with pytest.raises(EngineError, match="cannot be told use_python_runtime: it has no such option"):
        compiled(machine(StandIn()), tmp_path)


def test_an_installed_version_has_the_options():
    """Read as text: importing it takes a GPU."""
    found = find_spec("torch_tensorrt")
    if found is None or found.origin is None:
        pytest.skip("torch_tensorrt is not installed")
    dynamo = Path(found.origin).parent / "dynamo"
    compiler, settings = (ast.parse((dynamo / f).read_text()) for f in ("_compiler.py", "_settings.py"))
    (convert,) = (node for node in ast.walk(compiler) if getattr(node, "name", "") == CONVERT)
    (of_settings,) = (node for node in ast.walk(settings) if getattr(node, "name", "") == "CompilationSettings")
    named = {argument.arg for argument in (*convert.args.args, *convert.args.kwonlyargs)}
    assert {*SHARED, *OF_THE_CALL} <= named
    assert {*SHARED} <= {node.target.id for node in of_settings.body if isinstance(node, ast.AnnAssign)}


@pytest.mark.parametrize("network", ["unet", "gradient"])
def test_the_program_computes_what_the_graph_does(machine, tmp_path, network):
    """With upsampling as torch_tensorrt converts it: for the operation that tracing leaves it has no converter."""
    program = compiled(machine(StandIn()), tmp_path, network).program
    given = arguments(network, 5)
    for got, want in zip(program.module()(*given), graph(network)(*given), strict=True):
        assert torch.equal(got, want)
    operations = {str(node.target) for node in program.graph.nodes}
    assert "aten.upsample_nearest2d.default" not in operations
    assert ("aten.upsample_nearest2d.vec" in operations) == (network != "unet")


@pytest.mark.parametrize("network", ["decode", "gradient"])
def test_what_is_stored_and_how_it_is_loaded(machine, tmp_path, network):
    own = machine(StandIn(runs=graph(network)))
    compiled(own, tmp_path, network)
    assert sorted(file.name for file in tmp_path.iterdir()) == [BINDINGS, PLAN]  # and nothing that is unpickled
    run = get("torch-tensorrt").load(tmp_path, spec(network, "torch-tensorrt", GPU), "cuda:1")
    given, outputs = arguments(network, 3), {"decode": 1, "gradient": 2}[network]
    assert own.loaded.inputs == [f"tensors_{index}" for index in range(len(given))]
    assert own.loaded.outputs == [f"output{index}" for index in range(outputs)]
    assert own.loaded.device == "gpu 1" and own.loaded.unowned
    got, want = run(*given), graph(network)(*given)
    assert isinstance(got, tuple) and len(got) == outputs
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("file", [PLAN, BINDINGS])
def test_a_broken_payload_is_refused_by_name(machine, tmp_path, file):
    own = spec("decode", "torch-tensorrt", GPU)
    compiled(machine(StandIn()), tmp_path, "decode")
    (tmp_path / file).write_bytes(b"nothing that can be run")
    with pytest.raises(EngineError, match=rf"decode {own.key()} cannot be loaded: .* plan \(.*dfkd-engines build"):
        get("torch-tensorrt").load(tmp_path, own, "cuda")
