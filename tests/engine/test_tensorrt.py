"""TensorRT without a GPU: real ahead-of-time builds where tensorrt_rtx is installed, all else against a stand-in."""

import importlib
import inspect
import re
from dataclasses import replace

import pytest
import torch

from dfkd_engine.backends import get
from dfkd_engine.backends import tensorrt as tensorrt_module
from dfkd_engine.backends.tensorrt import PLAN, TENSORRT, TENSORRT_RTX, WAY, TensorRT
from dfkd_engine.compiled import Engine
from dfkd_engine.devices import family
from dfkd_engine.errors import EngineError
from dfkd_engine.export import to_onnx
from dfkd_engine.graph import trace
from dfkd_engine.parity import TOLERANCE, measure
from dfkd_engine.spec import TensorSpec
from tests.engine.small_functions import PixelGradient, images, teacher
from tests.engine.small_graphs import INPUTS, KINDS, OUTPUTS, ROWS, arguments, graph, networks, spec

pytest.importorskip("onnx", reason="TensorRT reads ONNX files")
pytest.importorskip("onnxruntime", reason="the stand-in's plans run in it")

from dfkd_engine.backends.tensorrt_plan import cache_file, profiles
from tests.engine import stand_in_tensorrt as stand_in
from tests.engine.stand_in_tensorrt import TARGETS, Graph, StandIn, Stream, fake_cuda

HERE = "cuda sm_90 NVIDIA H100 80GB HBM3"

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx (pip install 'dfkd[rtx]')"
)


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    return fake_cuda(monkeypatch, tmp_path / "cache")


@pytest.fixture
def payload(models, monkeypatch, tmp_path):
    """(backend, network) -> a folder with its plan, from the file that was exported once."""
    count = iter(range(99))

    def build(backend, network, own=None):
        monkeypatch.setattr(
            "dfkd_engine.export.to_onnx", lambda _, path: path.write_bytes(models(network).read_bytes())
        )
        folder = tmp_path / f"{network}-{next(count)}"
        folder.mkdir()
        backend.compile(graph(network), own or spec(network, backend.name, HERE), folder)
        return folder

    return build


@pytest.fixture
def engine_of(payload, cuda):
    """(network, rtx) -> an engine of the stand-in."""

    def load(network="decode", rtx=False):
        backend = StandIn(stand_in.library(rtx), rtx)
        cuda.library = backend.library()
        Stream.events = cuda.library.events
        own = spec(network, backend.name, HERE)
        return Engine(own, backend.load(payload(backend, network, own), own, "cpu"), "cpu")

    return load


# --- what is built --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "rows, wanted",
    [
        ((1, 1, 1), ((2, 2, 2),)),  # a call of one row is computed as two
        ((1, 2, 2), ((2, 2, 2),)),
        ((1, 4, 4), ((4, 4, 4), (2, 2, 3))),
        ((1, 16, 40), ((16, 16, 16), (2, 8, 40))),
    ],
)
def test_profiles_are_the_planned_rows_and_the_rest(rows, wanted):
    assert profiles(rows) == wanted


def test_a_plan_is_typed_capped_and_made_for_its_rows(payload, cuda):
    library = stand_in.library(rtx=False)
    for builds in (1, 2):  # timings of one build serve the next
        folder = payload(StandIn(library), "unet")
        config = library.Builder.last
        assert config.cache.content == b"timed " * (builds - 1)
        assert config.flags == {stand_in.BuilderFlag.EDITABLE_TIMING_CACHE}  # without TF32
    assert cache_file("timings", "tensorrt", library.__version__, HERE).read_bytes() == b"timed " * 2
    assert [file.name for file in folder.iterdir()] == [PLAN]  # no ONNX file stays
    assert config.pools == {stand_in.MemoryPoolType.WORKSPACE: 64 * 2**30}
    assert [[shape[0] for shape in profile.shapes["z"]] for profile in config.profiles] == [[4, 4, 4], [2, 2, 6]]
    assert "t" not in config.profiles[0].shapes  # its shape is fixed


@pytest.mark.parametrize("said", ["much", "0", "inf"])
def test_scratch_that_is_no_number_is_refused(said, monkeypatch):
    monkeypatch.setenv("DFKD_TENSORRT_WORKSPACE_GIB", said)
    with pytest.raises(EngineError, match=f"DFKD_TENSORRT_WORKSPACE_GIB is '{said}': it is a number of GiB above 0"):
        TENSORRT.flags("cuda")


def test_targets_reach_the_builder(payload, cuda):
    backend = StandIn(stand_in.library(rtx=True), rtx=True)
    payload(backend, "decode", spec("decode", backend.name, family(TARGETS)))
    config = backend.library().Builder.last
    assert config.num_compute_capabilities == 4
    assert [config.capabilities[place].name for place in range(4)] == ["SM80", "SM86", "SM89", "SM120"]
    assert config.cache is None  # it times no kernels


def test_a_failing_build_names_operation_and_layer(payload, cuda, models):
    import onnx

    library = stand_in.library(rtx=False)
    library.OnnxParser.refused = ("InstanceNormalization", "MaxPool")
    with pytest.raises(EngineError) as raised:
        payload(StandIn(library), "gradient")
    assert re.search(r"gradient cannot be compiled by tensorrt 11\.0\.0", raised.value.what)
    said = (
        r"it refuses MaxPool node_\w+ \(aten\.max_pool2d\.default\) of the layer teacher\.3: no importer is registered"
    )
    assert re.search(said, raised.value.why), raised.value.why

    node = next(n for n in onnx.load(models("decode")).graph.node if n.op_type == "Conv")
    layer = {entry.key: entry.value for entry in node.metadata_props}["module"]
    library = stand_in.library(rtx=False)
    library.Builder.fails = f"Could not find any implementation for node {node.name} due to insufficient workspace"
    with pytest.raises(EngineError, match=f"of the layer {layer}: .*insufficient workspace"):
        payload(StandIn(library), "decode")
    library.Builder.fails = "out of host memory"
    with pytest.raises(EngineError, match=r"out of host memory\. Plan fewer rows .* 64 GiB of scratch with DFKD_"):
        payload(StandIn(library), "decode")


def test_ends_of_another_dtype_are_found(models, cuda):
    own = spec("decode", "tensorrt", HERE)
    half = TensorSpec("z", own.inputs[0].shape, "float16")
    with pytest.raises(EngineError, match="the parsed network is another one"):
        StandIn(stand_in.library(rtx=False)).build(models("decode"), replace(own, inputs=(half,)))


# --- how it runs ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("network, rtx", [("unet", True), ("gradient", False), ("gradient", True)])
def test_results_of_every_batch(network, rtx, engine_of, cuda):
    engine = engine_of(network, rtx)
    exact, eager = networks().to("cpu", torch.float64).function(network), networks().function(network)
    batches = [arguments(network, rows, seed) for seed, rows in enumerate((1, 3, ROWS[1], 2, ROWS[2]))]
    parity = measure(engine, exact, eager, batches, KINDS[network])
    assert parity.problem(TOLERANCE[KINDS[network], "float32"]) is None, parity
    used = [event[2] for event in cuda.library.events if event[0] == "execute"]
    assert used == [1, 1, 0, 1, 1]  # the planned rows take the profile that was made for them
    assert len([event for event in cuda.library.events if event[0] == "context"]) == 2  # one a profile


def test_arguments_are_bound_in_place_and_moved_off_the_grid(engine_of, cuda, monkeypatch):
    engine, (z,) = engine_of(), arguments("decode", 4)
    want, seen, bind = engine(z)[0], {}, stand_in.IExecutionContext.set_tensor_address
    monkeypatch.setattr(
        stand_in.IExecutionContext,
        "set_tensor_address",
        lambda self, name, memory: (seen.update({name: memory}), bind(self, name, memory))[1],
    )
    (image,) = engine(z)
    assert seen == {"z": z.data_ptr(), "image": image.data_ptr()} and torch.equal(image, want)
    moved = torch.empty(z.numel() + 64)[12:][: z.numel()].view_as(z).copy_(z)
    assert torch.equal(engine(moved)[0], want) and seen["z"] != moved.data_ptr()


def test_a_call_stands_between_what_was_enqueued_and_what_comes(engine_of, cuda):
    engine = engine_of()
    engine(*arguments("decode", 4))
    events = [event for event in cuda.library.events if event[0] != "context"]
    side = events[0][1]
    assert events == [("wait", side, 0), ("execute", side, 0), ("wait", 0, side)]
    del cuda.library.events[:]
    cuda.stream = 7
    engine(*arguments("decode", 4))
    assert cuda.library.events == [("execute", 7, 0)]


def test_what_the_library_refuses_is_an_error(engine_of, cuda, monkeypatch):
    engine = engine_of()
    with pytest.raises(EngineError, match=r"cannot take 7 rows: its profiles are 4 to 4, 2 to 6 rows"):
        engine._run(*arguments("decode", 7))
    monkeypatch.setattr(stand_in.IExecutionContext, "execute_async_v3", lambda self, stream_handle: False)
    with pytest.raises(EngineError, match=r"decode .* failed at 4 rows"):
        engine(*arguments("decode", 4))
    monkeypatch.setattr(stand_in.IExecutionContext, "set_input_shape", lambda self, name, shape: False)
    with pytest.raises(EngineError, match="failed at 4 rows: z: "):
        engine(*arguments("decode", 4))


def test_lack_of_memory_stays_what_torch_says(engine_of, monkeypatch):
    """Scratch is torch's, so that whoever cuts calls smaller has one error to wait for."""
    engine, empty = engine_of(), torch.empty

    def short(*shape, **options):
        if options.get("dtype") is torch.uint8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", short)
    with pytest.raises(torch.OutOfMemoryError):
        engine(*arguments("decode", 4))


def test_a_plan_of_another_kind_is_refused(payload, cuda):
    backend, own = StandIn(stand_in.library(rtx=False)), spec("decode", "tensorrt", HERE)
    folder = payload(backend, "decode", own)
    with pytest.raises(EngineError, match="its plan has 2 profiles, its spec asks for 1"):
        backend.load(folder, replace(own, rows=(1, 2, 2)), "cpu")
    (folder / PLAN).write_bytes(b"\x00 nothing")
    with pytest.raises(EngineError, match=r"does not take its plan \(Serialization assertion.*dfkd-engines build"):
        backend.load(folder, own, "cpu")


def test_rtx_keeps_finished_kernels_and_says_why_a_plan_cannot_run(payload, cuda):
    library = stand_in.library(rtx=True)
    backend, own = StandIn(library, rtx=True), spec("decode", "tensorrt-rtx", HERE)
    folder = payload(backend, "decode", own)
    for process in (1, 2):
        backend.load(folder, own, "cpu")(*arguments("decode", 4))
        (kept,) = cache_file("x").parent.glob("kernels-*")
        assert kept.read_bytes() == b"kernels " * process
    library.Runtime.validity = (stand_in.EngineValidity.INVALID, 3)
    with pytest.raises(EngineError, match=r"is not for cpu .* \(version mismatch, unsupported cc\)"):
        backend.load(folder, own, "cpu")


@pytest.mark.parametrize("rtx", [False, True], ids=["tensorrt", "rtx"])
def test_the_quicker_way_is_kept(rtx, payload, cuda, monkeypatch):
    backend = StandIn(stand_in.library(rtx), rtx)
    cuda.library = backend.library()
    Stream.events = cuda.library.events
    own = spec("decode", backend.name, HERE)
    folder = payload(backend, "decode", own)
    for launches, replay in ((2.0, 1.0), (1.0, 2.0)):
        ticks = iter([0.0, launches] * 5 + [0.0, replay] * 5)
        monkeypatch.setattr(tensorrt_module.time, "perf_counter", lambda ticks=ticks: next(ticks))
        found = backend.tune(folder, own, "cpu", arguments("decode", 4))
        assert found == {"launches": 1000 * launches, "cuda graph": 1000 * replay}
        del cuda.library.events[:]
        Graph.replays = 0
        want = networks().function("decode")(*arguments("decode", 4, 3))[0]
        got = Engine(own, backend.load(folder, own, "cpu"), "cpu")(*arguments("decode", 4, 3))[0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        if rtx:  # it captures by itself
            strategies = [event[1] for event in cuda.library.events if event[0] == "context"]
            assert strategies == [stand_in.CudaGraphStrategy(replay < launches)]
        else:
            assert Graph.replays == int(replay < launches)


def test_a_replay_takes_new_arguments_and_gives_new_results(payload, cuda):
    backend, own = StandIn(stand_in.library(False)), spec("gradient", "tensorrt", HERE)
    cuda.library = backend.library()
    Stream.events = cuda.library.events
    folder = payload(backend, "gradient", own)
    (folder / WAY).write_text('{"cuda_graph": true}')
    engine, function, kept = Engine(own, backend.load(folder, own, "cpu"), "cpu"), networks().function("gradient"), []
    for seed, rows in enumerate((4, 4, 3, 4)):
        got = engine(*arguments("gradient", rows, seed))
        for one, other in zip(got, function(*arguments("gradient", rows, seed)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        kept.append((got, [x.clone() for x in got]))
    assert all(torch.equal(a, b) for got, copies in kept for a, b in zip(got, copies, strict=True))
    assert Graph.replays == 4


# --- what it needs --------------------------------------------------------------------------------------------------
def test_it_says_what_it_misses(monkeypatch, tmp_path):
    monkeypatch.setattr(tensorrt_module, "missing", lambda *names: ["tensorrt"])
    assert TENSORRT.unusable("cuda") == "tensorrt is not installed (pip install 'dfkd[tensorrt,onnx]')"
    monkeypatch.setattr(tensorrt_module, "missing", lambda *names: [])
    monkeypatch.setattr(tensorrt_module, "versions", lambda *names: {"tensorrt": "10.9.0", "tensorrt-rtx": "1.7.1.116"})
    assert "10.15 up to 12, and 10.9.0 is installed" in TENSORRT.unusable("cuda")
    installed = {"torch": "2.13.0+cpu", "tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1"}
    monkeypatch.setattr(tensorrt_module, "versions", lambda *names: installed)
    assert TENSORRT_RTX.versions()["torch"] == "2.13.0"  # builds of torch do not part engines
    assert "for a CUDA device, not for cpu" in TENSORRT.unusable("cpu x86_64 avx2")
    assert "--target sm_75,sm_80" in TENSORRT_RTX.unusable("cpu")
    assert "none: it times kernels on the GPU" in TENSORRT.unusable("cuda sm_89")
    assert "cannot compile for sm_90" in TENSORRT_RTX.unusable("cuda sm_89+sm_90")
    assert TENSORRT_RTX.unusable(family(TARGETS)) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TENSORRT.unusable("cuda:0") == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert TENSORRT.unusable(HERE) is None and TENSORRT.unusable("cuda:1", "bfloat16") is None

    (tmp_path / "broken_tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match=r"cannot be imported: libnvinfer.*NVIDIA's own package index"):
        TensorRT("tensorrt", "broken_tensorrt", "10.15", "12").library()


# --- against the real classes ---------------------------------------------------------------------------------------
OURS = {"StandIn", "Stream", "Graph"}
OF_TESTS = {"fails", "last", "refused", "validity", "events", "captured"}  # members that tests set


@needs_rtx
def test_the_stand_in_has_nothing_that_the_library_has_not():
    """Names, members, and the names of the arguments as pybind writes them into docstrings."""
    real_module = importlib.import_module("tensorrt_rtx")
    parts = {n: v for n, v in vars(stand_in).items() if inspect.isclass(v) and v.__module__ == stand_in.__name__}
    assert len(parts) > 15
    for name, value in parts.items():
        if name in OURS:
            continue
        real = getattr(real_module, name)
        if issubclass(value, stand_in.IntEnum):
            assert {member.name for member in value} <= set(real.__members__)
            continue
        for member, function in vars(value).items():
            if member.startswith("_") or member in OF_TESTS:
                continue
            assert hasattr(real, member), f"{name}.{member}"
            if not inspect.isfunction(function):
                continue
            parameters = [p for p in inspect.signature(function).parameters if p != "self"]
            signatures = re.findall(rf"{member}\((.*?)\) ->", getattr(real, member).__doc__)
            real_ones = [re.findall(r"(?:^|, )(\w+):", signature)[1:] for signature in signatures]
            assert any(one[: len(parameters)] == parameters for one in real_ones), (name, member, real_ones)
    assert hasattr(real_module, "CudaGraphStrategy") and hasattr(real_module.Runtime, "get_engine_validity")
    assert {target.replace("sm_", "SM") for target in TENSORRT_RTX.targets} <= set(
        real_module.ComputeCapability.__members__
    )


# --- the real library, ahead of time --------------------------------------------------------------------------------
@needs_rtx
@pytest.mark.trt
@pytest.mark.parametrize("network", ["unet", "gradient"])
def test_networks_build_for_all_targets(network, models):
    plan = TENSORRT_RTX.build(models(network), spec(network, "tensorrt-rtx", family(TARGETS)))
    assert plan.nbytes > sum(value.nbytes for value in graph(network).module.buffers())  # the weights are in it


@needs_rtx
@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bottlenecks", "vit"])
def test_gradients_of_teachers_of_every_kind_build(name, tmp_path):
    """Max pools and windows that stop short, layer norms, attention, GELU: what parsers stumble over."""
    size, network = teacher(name)
    function = PixelGradient(network)
    names = ("gradient", "cls", "bn") if function.layers else ("gradient", "cls")
    traced = trace(function, images(size), output_names=names)
    to_onnx(traced, tmp_path / "model.onnx")
    own = replace(spec("gradient", "tensorrt-rtx", family(("sm_89",))), inputs=traced.inputs, outputs=traced.outputs)
    assert TENSORRT_RTX.build(tmp_path / "model.onnx", own).nbytes


@needs_rtx
@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize("dtype, network", [("float16", "gradient"), ("bfloat16", "unet")])
def test_half_precision_builds(dtype, network, tmp_path):
    half, names = networks().to("cpu", getattr(torch, dtype)), [output.name for output in OUTPUTS[network]]
    traced = trace(half.function(network), INPUTS[network], output_names=names)
    to_onnx(traced, tmp_path / "model.onnx")
    own = spec(network, "tensorrt-rtx", family(("sm_89",)), dtype)
    assert TENSORRT_RTX.build(tmp_path / "model.onnx", own).nbytes


@needs_rtx
@pytest.mark.trt
def test_the_real_library_names_the_layer_that_it_refuses(models, tmp_path):
    """A pool that also returns its indices: TensorRT's parser knows none with two outputs."""
    import onnx

    model = onnx.load(models("gradient"))
    pool = next(node for node in model.graph.node if node.op_type == "MaxPool")
    pool.output.append("indices")
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(EngineError, match=r"it refuses MaxPool .* of the layer teacher\.3: This version of TensorRT"):
        TENSORRT_RTX.build(tmp_path / "model.onnx", spec("gradient", "tensorrt-rtx", family(("sm_89",))))
    assert get("tensorrt-rtx") is TENSORRT_RTX
