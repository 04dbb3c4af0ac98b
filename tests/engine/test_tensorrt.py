"""TensorRT without a GPU: real ahead-of-time builds where tensorrt_rtx is installed, all else against a stand-in."""

import importlib
import inspect
import re
from dataclasses import replace

import pytest
import torch
from dfkd_engine.backends.tensorrt_library import profiles
from dfkd_engine.targets import covers, family, targets_of

from dfkd_engine.backends import get, machine_cache
from dfkd_engine.backends import tensorrt as tensorrt_module
from dfkd_engine.backends.tensorrt import PLAN, TENSORRT, TENSORRT_RTX, WAY, TensorRT
from dfkd_engine.compiled import Engine
from dfkd_engine.errors import EngineError
from dfkd_engine.export import to_onnx
from dfkd_engine.graph import trace
from dfkd_engine.parity import TOLERANCE, measure
from dfkd_engine.spec import TensorSpec
from tests.engine import stand_in_tensorrt as stand_in
from tests.engine.small_functions import PixelGradient, images, teacher
from tests.engine.small_graphs import BATCH, INPUTS, KINDS, OUTPUTS, arguments, graph, networks, spec
from tests.engine.stand_in_cuda import TARGETS, Graph, StandIn, Stream, fake_cuda

pytest.importorskip("onnx", reason="TensorRT reads ONNX files")
pytest.importorskip("onnxruntime", reason="the stand-in's plans run in it")

HERE = "cuda sm_90 NVIDIA H100 80GB HBM3"

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx (pip install 'dfkd[rtx]')"
)


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    return fake_cuda(monkeypatch, tmp_path / "cache")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """network -> its ONNX file, exported once."""
    made = {}

    def of(network):
        if network not in made:
            made[network] = tmp_path_factory.mktemp(network) / "model.onnx"
            to_onnx(graph(network), made[network])
        return made[network]

    return of


@pytest.fixture
def payload(models, monkeypatch, tmp_path):
    """(backend, network) -> a folder with its plan, from the exported file."""
    places = {}

    def build(backend, network, own=None):
        monkeypatch.setattr(
            "dfkd_engine.export.to_onnx", lambda _, path: path.write_bytes(models(network).read_bytes())
        )
        folder = tmp_path / f"{network}-{len(places)}"
        folder.mkdir()
        places[folder] = network
        backend.compile(graph(network), own or spec(network, backend.name, HERE), folder)
        return folder

    return build


def stand_in_engine(backend, payload, network, cuda):
    own = spec(network, backend.name, HERE)
    cuda.library = backend.library()
    Stream.events = cuda.library.events
    return Engine(own, backend.load(payload(backend, network, own), own, "cpu"), "cpu")


# what is built


@pytest.mark.parametrize(
    "batch, wanted",
    [
        ((1, 1, 1), ((2, 2, 2),)),  # a call of one row is computed as two
        ((1, 2, 2), ((2, 2, 2),)),
        ((1, 4, 4), ((4, 4, 4), (2, 2, 3))),
        ((1, 64, 64), ((64, 64, 64), (2, 32, 63))),
        ((1, 16, 40), ((16, 16, 16), (2, 8, 40))),
    ],
)
def test_profiles_are_the_planned_rows_and_the_rest(batch, wanted):
    assert profiles(batch) == wanted
    covered = {rows for low, _, high in wanted for rows in range(low, high + 1)}
    assert covered == set(range(2, max(batch[2], 2) + 1))


def test_a_plan_is_typed_capped_and_made_for_its_rows(payload, cuda):
    library = stand_in.library(rtx=False)
    folder = payload(StandIn(library), "unet")
    assert [file.name for file in folder.iterdir()] == [PLAN]  # no ONNX file stays
    config = library.Builder.last
    assert stand_in.BuilderFlag.TF32 not in config.flags
    assert config.pools == {stand_in.MemoryPoolType.WORKSPACE: 64 * 2**30}
    rows = [[shape[0] for shape in profile.shapes["z"]] for profile in config.profiles]
    assert rows == [[4, 4, 4], [2, 2, 6]]
    assert "t" not in config.profiles[0].shapes  # its shape is fixed


@pytest.mark.parametrize("said", ["much", "0", "-4", "inf"])
def test_scratch_that_is_no_number_is_refused(said, monkeypatch):
    monkeypatch.setenv("DFKD_TENSORRT_WORKSPACE_GIB", said)
    with pytest.raises(EngineError, match=f"DFKD_TENSORRT_WORKSPACE_GIB is '{said}': it is a number of GiB above 0"):
        TENSORRT.flags("cuda")


def test_timings_of_one_build_serve_the_next(payload, cuda):
    library = stand_in.library(rtx=False)
    for builds in (1, 2):
        payload(StandIn(library), "decode")
        assert library.Builder.last.cache.content == b"timed " * (builds - 1)
        assert stand_in.BuilderFlag.EDITABLE_TIMING_CACHE in library.Builder.last.flags
    kept = machine_cache.place("timings", "tensorrt", library.__version__, HERE)
    assert machine_cache.read(kept) == b"timed " * 2


def test_targets_reach_the_builder(payload, cuda):
    library = stand_in.library(rtx=True)
    backend = StandIn(library, rtx=True)
    payload(backend, "decode", spec("decode", backend.name, family(TARGETS)))
    config = library.Builder.last
    assert config.num_compute_capabilities == 4
    assert [config.capabilities[place].name for place in range(4)] == ["SM80", "SM86", "SM89", "SM120"]
    assert config.cache is None  # it times no kernels


def test_a_refused_operation_is_named_with_its_layer(payload, cuda):
    library = stand_in.library(rtx=False)
    library.OnnxParser.refused = ("InstanceNormalization", "MaxPool")
    with pytest.raises(EngineError) as raised:
        payload(StandIn(library), "gradient")
    assert re.search(r"gradient cannot be compiled by tensorrt 11\.0\.0", raised.value.what)
    assert re.search(
        r"it refuses MaxPool node_\w+ \(aten\.max_pool2d\.default\) of the layer teacher\.3: no importer is registered",
        raised.value.why,
    ), raised.value.why


def test_a_failing_build_says_what_the_library_said(payload, cuda, models):
    import onnx

    node = next(n for n in onnx.load(models("decode")).graph.node if n.op_type == "Conv")
    layer = {entry.key: entry.value for entry in node.metadata_props}["module"]
    library = stand_in.library(rtx=False)
    library.Builder.fails = f"Could not find any implementation for node {node.name} due to insufficient workspace"
    with pytest.raises(EngineError, match=f"of the layer {layer}: .*insufficient workspace"):
        payload(StandIn(library), "decode")
    library.Builder.fails = "out of host memory"
    with pytest.raises(EngineError, match=r"out of host memory\. plan fewer rows .* 64 GiB of scratch with DFKD_"):
        payload(StandIn(library), "decode")


def test_ends_of_another_dtype_are_found(models, cuda):
    own = spec("decode", "tensorrt", HERE)
    half = TensorSpec("z", own.inputs[0].shape, "float16")
    with pytest.raises(EngineError, match="the parsed network is another one"):
        StandIn(stand_in.library(rtx=False)).build(models("decode"), replace(own, inputs=(half,)))


# how it runs


@pytest.mark.parametrize("network", INPUTS)
@pytest.mark.parametrize("rtx", [False, True], ids=["tensorrt", "rtx"])
def test_results_of_every_batch(network, rtx, payload, cuda):
    engine = stand_in_engine(StandIn(stand_in.library(rtx), rtx), payload, network, cuda)
    exact, eager = networks().to("cpu", torch.float64).function(network), networks().function(network)
    batches = [arguments(network, rows, seed) for seed, rows in enumerate((1, 3, BATCH[1], 2, BATCH[2]))]
    parity = measure(engine, exact, eager, batches, KINDS[network])
    assert parity.problem(TOLERANCE[KINDS[network], "float32"]) is None, parity
    used = [event[2] for event in cuda.library.events if event[0] == "execute"]
    assert used == [1, 1, 0, 1, 1]  # the planned rows take the profile that was made for them


def test_out_is_bound_and_nothing_is_copied(payload, cuda):
    engine = stand_in_engine(StandIn(stand_in.library(False)), payload, "decode", cuda)
    given = arguments("decode", 4)
    out = (torch.full((4, 3, 8, 8), 7.0),)
    seen = []
    context = stand_in.IExecutionContext.set_tensor_address
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            stand_in.IExecutionContext,
            "set_tensor_address",
            lambda self, name, memory: seen.append((name, memory)) or context(self, name, memory),
        )
        assert engine(*given, out=out)[0] is out[0]
    assert set(seen) == {("z", given[0].data_ptr()), ("image", out[0].data_ptr())}
    torch.testing.assert_close(out[0], engine(*given)[0], rtol=0, atol=0)


def test_a_result_over_an_argument_is_written_when_that_was_read(payload, cuda):
    """decode_vjp gives a tensor like its first argument: bound to it, it would be read half overwritten."""
    engine = stand_in_engine(StandIn(stand_in.library(False)), payload, "decode_vjp", cuda)
    z, weights = arguments("decode_vjp", 4)
    want = engine(z, weights)[0]
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        bind = stand_in.IExecutionContext.set_tensor_address
        patch.setattr(
            stand_in.IExecutionContext,
            "set_tensor_address",
            lambda self, name, memory: seen.append(memory) or bind(self, name, memory),
        )
        assert engine(z, weights, out=(z,))[0] is z
    assert len(set(seen)) == 3 and torch.equal(z, want)


@pytest.mark.parametrize("offset", [0, 16, 48])
def test_memory_off_the_grid_is_moved(payload, cuda, offset):
    engine = stand_in_engine(StandIn(stand_in.library(False)), payload, "decode", cuda)
    (z,) = arguments("decode", 4)
    place = torch.empty(z.numel() + 64)
    moved = place[offset // 4 :][: z.numel()].view_as(z).copy_(z)
    results = torch.empty(4 * 3 * 8 * 8 + 64)[offset // 4 :][: 4 * 3 * 8 * 8].view(4, 3, 8, 8)
    engine(moved, out=(results,))
    torch.testing.assert_close(results, engine(z)[0], rtol=0, atol=0)


def test_a_call_stands_between_what_was_enqueued_and_what_comes(payload, cuda):
    engine = stand_in_engine(StandIn(stand_in.library(False)), payload, "decode", cuda)
    engine(*arguments("decode", 4))
    side = cuda.library.events[0][1]
    waits_and_runs = [event[:2] for event in cuda.library.events if event[0] != "context"]
    assert waits_and_runs == [("wait", side), ("execute", side), ("wait", 0)]
    assert cuda.library.events[0] == ("wait", side, 0) and cuda.library.events[-1] == ("wait", 0, side)
    del cuda.library.events[:]
    cuda.stream = 7
    engine(*arguments("decode", 4))
    assert cuda.library.events == [("execute", 7, 0)]


def test_a_profile_has_one_context(payload, cuda):
    engine = stand_in_engine(StandIn(stand_in.library(False)), payload, "decode", cuda)
    for rows in (4, 3, 4, 2):
        engine(*arguments("decode", rows))
    assert len([event for event in cuda.library.events if event[0] == "context"]) == 2


def test_rows_that_fit_no_profile_are_refused(payload, cuda):
    backend = StandIn(stand_in.library(False))
    own = spec("decode", "tensorrt", HERE)
    run = backend.load(payload(backend, "decode", own), own, "cpu")
    with pytest.raises(EngineError, match=r"cannot take 7 rows: its profiles are 4 to 4, 2 to 6 rows"):
        run(*arguments("decode", 7))


def test_what_the_library_refuses_is_an_error(payload, cuda, monkeypatch):
    engine = stand_in_engine(StandIn(stand_in.library(False)), payload, "decode", cuda)
    monkeypatch.setattr(stand_in.IExecutionContext, "execute_async_v3", lambda self, stream_handle: False)
    with pytest.raises(EngineError, match=r"decode .* failed at 4 rows"):
        engine(*arguments("decode", 4))
    monkeypatch.setattr(stand_in.IExecutionContext, "set_input_shape", lambda self, name, shape: False)
    with pytest.raises(EngineError, match="failed at 4 rows: z: "):
        engine(*arguments("decode", 4))


def test_lack_of_memory_stays_what_torch_says(payload, cuda, monkeypatch):
    """Scratch is torch's, so that whoever cuts calls smaller has one error to wait for."""
    engine = stand_in_engine(StandIn(stand_in.library(False)), payload, "decode", cuda)
    empty = torch.empty

    def short(*shape, **options):
        if options.get("dtype") is torch.uint8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", short)
    with pytest.raises(torch.OutOfMemoryError):
        engine(*arguments("decode", 4))


def test_a_plan_of_another_kind_is_refused(payload, cuda):
    backend = StandIn(stand_in.library(rtx=False))
    own = spec("decode", "tensorrt", HERE)
    folder = payload(backend, "decode", own)
    with pytest.raises(EngineError, match="its plan has 2 profiles, its spec asks for 1"):
        backend.load(folder, replace(own, batch=(1, 2, 2)), "cpu")
    (folder / PLAN).write_bytes(b"\x00 nothing")
    with pytest.raises(EngineError, match=r"does not take its plan \(Serialization assertion.*dfkd-engines build"):
        backend.load(folder, own, "cpu")


def test_rtx_says_why_a_plan_cannot_run_here(payload, cuda):
    library = stand_in.library(rtx=True)
    backend = StandIn(library, rtx=True)
    own = spec("decode", "tensorrt-rtx", HERE)
    folder = payload(backend, "decode", own)
    library.Runtime.validity = (stand_in.EngineValidity.INVALID, 3)
    with pytest.raises(EngineError, match=r"is not for cpu .* \(version mismatch, unsupported cc\)"):
        backend.load(folder, own, "cpu")


def test_finished_kernels_are_kept_for_the_next_process(payload, cuda):
    backend = StandIn(stand_in.library(rtx=True), rtx=True)
    own = spec("decode", "tensorrt-rtx", HERE)
    folder = payload(backend, "decode", own)
    for process in (1, 2):
        backend.load(folder, own, "cpu")(*arguments("decode", 4))
        (kept,) = (machine_cache.place("x").parent).glob("kernels-*")
        assert kept.read_bytes() == b"kernels " * process


# CUDA graphs


@pytest.mark.parametrize("rtx", [False, True], ids=["tensorrt", "rtx"])
def test_the_quicker_way_is_kept(rtx, payload, cuda, monkeypatch):
    backend = StandIn(stand_in.library(rtx), rtx)
    cuda.library = backend.library()
    Stream.events = cuda.library.events
    own = spec("decode", backend.name, HERE)
    folder = payload(backend, "decode", own)
    for graphs_are_quicker in (True, False):
        ticks = iter([0.0, 2.0] * 5 + [0.0, 1.0] * 5 if graphs_are_quicker else [0.0, 1.0] * 5 + [0.0, 2.0] * 5)
        monkeypatch.setattr(tensorrt_module.time, "perf_counter", lambda ticks=ticks: next(ticks))
        found = backend.tune(folder, own, "cpu", arguments("decode", 4))
        assert found == ({"launches": 2000.0, "cuda graph": 1000.0} if graphs_are_quicker else
                         {"launches": 1000.0, "cuda graph": 2000.0})  # fmt: skip
        del cuda.library.events[:]
        Graph.replays = 0
        want = networks().function("decode")(*arguments("decode", 4, 3))[0]
        got = Engine(own, backend.load(folder, own, "cpu"), "cpu")(*arguments("decode", 4, 3))[0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        if rtx:  # it captures by itself
            strategies = [event[1] for event in cuda.library.events if event[0] == "context"]
            assert strategies == [stand_in.CudaGraphStrategy(graphs_are_quicker)]
        else:
            assert Graph.replays == int(graphs_are_quicker)


def test_a_replay_takes_new_arguments_and_gives_new_results(payload, cuda):
    backend = StandIn(stand_in.library(False))
    cuda.library = backend.library()
    Stream.events = cuda.library.events
    own = spec("gradient", "tensorrt", HERE)
    folder = payload(backend, "gradient", own)
    (folder / WAY).write_text('{"cuda_graph": true}')
    engine = Engine(own, backend.load(folder, own, "cpu"), "cpu")
    function = networks().function("gradient")
    kept = []
    for seed, rows in enumerate((4, 4, 3, 4)):
        got = engine(*arguments("gradient", rows, seed))
        want = function(*arguments("gradient", rows, seed))
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        kept.append((got, [x.clone() for x in got]))
    assert all(torch.equal(a, b) for got, copies in kept for a, b in zip(got, copies, strict=True))
    assert Graph.replays == 4


# what it needs, and for which devices


def test_targets():
    assert family(("sm_120", "sm_89", "sm_89")) == "cuda sm_89+sm_120"
    assert targets_of("cuda sm_89+sm_120") == ("sm_89", "sm_120") and targets_of("cuda sm_89") == ("sm_89",)
    assert targets_of(HERE) == () and targets_of("cpu x86_64") == ()
    assert covers("cuda sm_89+sm_90", HERE) and not covers("cuda sm_89", HERE)
    assert not covers("cuda sm_90", "cuda sm_90")  # a family is no device
    with pytest.raises(EngineError, match="'SM89' is unknown"):
        family(("SM89",))


def test_it_says_what_it_misses(monkeypatch):
    monkeypatch.setattr(tensorrt_module, "missing", lambda *names: ["tensorrt"])
    assert TENSORRT.unusable("cuda") == "tensorrt is not installed (pip install 'dfkd[tensorrt,onnx]')"
    monkeypatch.setattr(tensorrt_module, "missing", lambda *names: [])
    monkeypatch.setattr(tensorrt_module, "versions", lambda *names: {"tensorrt": "10.9.0", "tensorrt-rtx": "1.7.1.116"})
    assert "10.15 up to 12, and 10.9.0 is installed" in TENSORRT.unusable("cuda")
    monkeypatch.setattr(tensorrt_module, "versions", lambda *names: {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1"})
    assert "for a CUDA device, not for cpu" in TENSORRT.unusable("cpu x86_64 avx2")
    assert "--target sm_75,sm_80" in TENSORRT_RTX.unusable("cpu")
    assert "none: it times kernels on the GPU" in TENSORRT.unusable("cuda sm_89")
    assert "cannot compile for sm_90" in TENSORRT_RTX.unusable("cuda sm_89+sm_90")
    assert TENSORRT_RTX.unusable(family(TARGETS)) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TENSORRT.unusable("cuda:0") == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert TENSORRT.unusable(HERE) is None and TENSORRT.unusable("cuda:1", "bfloat16") is None


def test_a_library_that_does_not_load_is_an_error():
    backend = TensorRT("tensorrt", "tests.engine.broken_tensorrt", "10.15", "12")
    with pytest.raises(EngineError, match=r"cannot be imported.*NVIDIA's own package index"):
        backend.library()


def test_builds_of_torch_do_not_part_engines(monkeypatch):
    monkeypatch.setattr(tensorrt_module, "versions", lambda *names: {"torch": "2.13.0+cpu", "tensorrt-rtx": "1.7.1"})
    assert TENSORRT_RTX.versions() == {"torch": "2.13.0", "tensorrt-rtx": "1.7.1"}


# against the real classes


def _parts():
    """Every class of the stand-in with its members and the real class's."""
    skipped = {"SimpleNamespace", "ModuleType", "Any", "IntEnum"}
    return [
        (name, value)
        for name, value in vars(stand_in).items()
        if inspect.isclass(value) and name not in skipped and value.__module__ == stand_in.__name__
    ]


@needs_rtx
@pytest.mark.parametrize("name, value", _parts(), ids=[name for name, _ in _parts()])
def test_the_stand_in_has_nothing_that_the_library_has_not(name, value):
    """Names, members, and the names of the arguments as pybind writes them into docstrings."""
    real = getattr(importlib.import_module("tensorrt_rtx"), name)
    own = {"fails", "last", "refused", "validity", "events", "captured"}  # what tests set
    if issubclass(value, stand_in.IntEnum):
        assert {member.name for member in value} <= set(real.__members__)
        return
    for member, function in vars(value).items():
        if member.startswith("_") or member in own:
            continue
        assert hasattr(real, member), f"{name}.{member}"
        if not inspect.isfunction(function):
            continue
        document = getattr(real, member).__doc__
        parameters = [p for p in inspect.signature(function).parameters if p != "self"]
        signatures = re.findall(rf"{member}\((.*?)\) ->", document)
        real_ones = [re.findall(r"(?:^|, )(\w+):", signature)[1:] for signature in signatures]
        assert any(one[: len(parameters)] == parameters for one in real_ones), (name, member, parameters, real_ones)


@needs_rtx
def test_the_library_has_what_tells_the_two_apart():
    real = importlib.import_module("tensorrt_rtx")
    assert hasattr(real, "CudaGraphStrategy") and hasattr(real.Runtime, "get_engine_validity")
    assert hasattr(real.IRuntimeConfig, "cuda_graph_strategy") and hasattr(
        real.IBuilderConfig, "num_compute_capabilities"
    )
    assert {target.replace("sm_", "SM") for target in TENSORRT_RTX.targets} <= set(real.ComputeCapability.__members__)


# the real library, ahead of time


@needs_rtx
@pytest.mark.trt
@pytest.mark.parametrize("network", INPUTS)
def test_every_network_builds_for_all_targets(network, models, tmp_path):
    own = spec(network, "tensorrt-rtx", family(TARGETS))
    plan = TENSORRT_RTX.build(models(network), own)
    assert plan.nbytes > sum(value.nbytes for value in graph(network).module.buffers())  # the weights are in it


@needs_rtx
@pytest.mark.trt
@pytest.mark.parametrize("name", ["resnet_bottleneck", "convnext", "vit"])
def test_gradients_of_teachers_of_every_kind_build(name, tmp_path):
    """Max pools and windows that stop short, layer norms, attention, GELU: what parsers stumble over."""
    size, network = teacher(name)
    bn = name.startswith("resnet")
    function, names = PixelGradient(network, size, bn=bn), ("gradient", "cls", "bn")[: 2 + bn]
    traced = trace(function, images(size), output_names=names)
    to_onnx(traced, tmp_path / "model.onnx")
    own = replace(spec("gradient", "tensorrt-rtx", family(TARGETS)), inputs=traced.inputs, outputs=traced.outputs)
    assert TENSORRT_RTX.build(tmp_path / "model.onnx", own).nbytes


@needs_rtx
@pytest.mark.trt
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_builds(dtype, tmp_path):
    half = networks().to("cpu", getattr(torch, dtype))
    traced = trace(half.function("gradient"), INPUTS["gradient"], output_names=OUTPUTS["gradient"])
    to_onnx(traced, tmp_path / "model.onnx")
    own = spec("gradient", "tensorrt-rtx", family(("sm_89",)), dtype)
    assert TENSORRT_RTX.build(tmp_path / "model.onnx", own).nbytes


@needs_rtx
@pytest.mark.trt
def test_the_real_library_names_the_layer_that_it_refuses(tmp_path):
    """A pool that also returns its indices: TensorRT's parser knows none with two outputs."""
    import onnx

    to_onnx(graph("gradient"), tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    pool = next(node for node in model.graph.node if node.op_type == "MaxPool")
    pool.output.append("indices")
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(EngineError, match=r"it refuses MaxPool .* of the layer teacher\.3: This version of TensorRT"):
        TENSORRT_RTX.build(tmp_path / "model.onnx", spec("gradient", "tensorrt-rtx", family(("sm_89",))))


@needs_rtx
@pytest.mark.trt
@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU that could run the plan")
def test_a_plan_is_not_loaded_where_nothing_can_run_it(tmp_path):
    with pytest.raises(EngineError, match="cannot be loaded: torch finds no CUDA device"):
        get("tensorrt-rtx").load(tmp_path, spec("decode", "tensorrt-rtx", HERE), "cuda")
