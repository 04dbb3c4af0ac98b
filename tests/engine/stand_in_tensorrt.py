"""TensorRT's Python interface, as far as we call it, without a GPU: plans that ONNX Runtime runs on the CPU.

It is as strict as the library where a mistake would corrupt memory or give wrong results on a GPU: a shape outside the
active profile, an address that is missing or not aligned, scratch memory that was never given, the default stream. It
reads and writes the caller's memory by address, so that what is bound is what is used. test_tensorrt.py
holds names, arguments and members against the real classes of tensorrt_rtx where that is installed.

`library(...)` makes a module of either kind; `events` on it are what reached the device, in order.
"""

import base64
import ctypes
import json
from contextlib import contextmanager, nullcontext
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy
import onnx
import onnxruntime
import torch

from dfkd_engine.backends import tensorrt_plan
from dfkd_engine.backends.tensorrt import TensorRT

SCRATCH = 1024  # bytes a row that a context wants
ALIGNMENT = 64  # of addresses, as torch has them on a CPU; on a GPU the library asks for 256 and torch gives 512
_NUMPY = {"FLOAT": numpy.float32, "HALF": numpy.float16, "INT64": numpy.int64}
_ONNX = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.INT64: "INT64"}


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2

    def __init__(self) -> None:
        pass


class DataType(IntEnum):
    FLOAT, HALF, BF16, INT8, INT32, INT64 = 0, 1, 2, 3, 4, 5


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = 0, 1, 2


class CudaGraphStrategy(IntEnum):
    DISABLED, WHOLE_GRAPH_CAPTURE = 0, 1


class EngineValidity(IntEnum):
    VALID, SUBOPTIMAL, INVALID = 0, 1, 2


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH, UNSUPPORTED_CC = 1, 2


class ComputeCapability(IntEnum):
    SM80, SM86, SM89, SM120 = 80, 86, 89, 120


class MemoryPoolType(IntEnum):
    WORKSPACE = 0


class BuilderFlag(IntEnum):
    TF32, EDITABLE_TIMING_CACHE = 0, 1


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
        self.shapes[input] = [list(min), list(opt), list(max)]


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"timed "


class IBuilderConfig:
    def __init__(self) -> None:
        self.flags = {BuilderFlag.TF32}
        self.profiles: list[IOptimizationProfile] = []
        self.pools: dict[Any, int] = {}
        self.capabilities: dict[int, Any] = {}
        self.cache: ITimingCache | None = None
        self.num_compute_capabilities = 0

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self.pools[pool] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        self.capabilities[index] = compute_capability
        return index < self.num_compute_capabilities

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        assert self.cache is not None
        return self.cache


class INetworkDefinition:
    def __init__(self, typed: bool) -> None:
        self.typed, self.model = typed, b""
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_input(self, index: int) -> Any:
        return self.inputs[index]

    def get_output(self, index: int) -> Any:
        return self.outputs[index]


def _error(node: Any) -> Any:
    return SimpleNamespace(
        node_name=lambda: node.name, node_operator=lambda: node.op_type, desc=lambda: "no importer is registered"
    )


class OnnxParser:
    refused: tuple[str, ...] = ()  # operators that this library has not

    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        self.network = network
        self._errors: list[Any] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def parse_from_file(self, model: str) -> bool:
        parsed = onnx.load(model)
        self._errors = [_error(node) for node in parsed.graph.node if node.op_type in self.refused]
        for ends, found in ((parsed.graph.input, self.network.inputs), (parsed.graph.output, self.network.outputs)):
            found += [
                SimpleNamespace(name=end.name, dtype=DataType[_ONNX[end.type.tensor_type.elem_type]]) for end in ends
            ]
        self.network.model = parsed.SerializeToString()
        return not self._errors


class Builder:
    fails = ""  # what it logs instead of a plan
    last: Any = None  # the config of the last build

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(bool(flags & 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        assert network.typed, "weak typing is gone"
        type(self).last = config
        if self.fails:
            self.logger.log(ILogger.ERROR, self.fails)
            return None
        ends = [{"name": x.name, "type": x.dtype.name} for x in (*network.inputs, *network.outputs)]
        plan = {
            "model": base64.b64encode(network.model).decode(),
            "inputs": len(network.inputs),
            "ends": ends,
            "profiles": [profile.shapes for profile in config.profiles],
        }
        return json.dumps(plan).encode()


class IRuntimeCache:
    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, blob: bytes) -> bool:
        self.content = bytes(blob)
        return True

    def serialize(self) -> bytes:
        return self.content + b"kernels "


class IRuntimeConfig:
    def __init__(self) -> None:
        self.strategy: Any = ExecutionContextAllocationStrategy.STATIC
        self.cuda_graph_strategy: Any = CudaGraphStrategy.DISABLED
        self.cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True

    def get_runtime_cache(self) -> IRuntimeCache:
        return self.cache


class IExecutionContext:
    def __init__(self, engine: "ICudaEngine", config: IRuntimeConfig) -> None:
        assert config.strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        self.engine, self.profile, self.scratch = engine, 0, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = profile_index
        return 0 <= profile_index < self.engine.num_optimization_profiles

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.engine.get_device_memory_size_for_profile_v2(self.profile)
        self.scratch = memory

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        limits = self.engine.plan["profiles"][self.profile].get(name)
        self.shapes[name] = tuple(shape)
        return limits is None or all(a <= n <= b for a, n, b in zip(limits[0], shape, limits[2], strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return name in [end["name"] for end in self.engine.plan["ends"]] and memory % ALIGNMENT == 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle, "the default stream waits for the device"
        plan = self.engine.plan
        if not self.scratch or len(self.addresses) < len(plan["ends"]):
            return False
        self.engine.events.append(("execute", stream_handle, self.profile))
        again = (dict(self.shapes), dict(self.addresses))
        self.engine.captured.append(lambda: self._run(*again))
        self._run(*again)
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        ends, count = self.engine.plan["ends"], self.engine.plan["inputs"]
        given = {}
        for end in ends[:count]:
            kind, shape = numpy.dtype(_NUMPY[end["type"]]), shapes[end["name"]]
            size = int(numpy.prod(shape)) * kind.itemsize
            memory = (ctypes.c_byte * size).from_address(addresses[end["name"]])
            given[end["name"]] = numpy.frombuffer(memory, kind).reshape(shape)
        results = self.engine.session.run([end["name"] for end in ends[count:]], given)
        for end, result in zip(ends[count:], results, strict=True):
            content = numpy.ascontiguousarray(result).tobytes()
            ctypes.memmove(addresses[end["name"]], content, len(content))


class ICudaEngine:
    def __init__(self, plan: dict[str, Any], events: list[Any], captured: list[Any]) -> None:
        self.plan, self.events, self.captured = plan, events, captured
        self.session = onnxruntime.InferenceSession(base64.b64decode(plan["model"]), providers=["CPUExecutionProvider"])

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.plan["profiles"])

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext:
        self.events.append(("context", runtime_config.cuda_graph_strategy))
        return IExecutionContext(self, runtime_config)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        shapes = self.plan["profiles"][profile_index].values()
        return SCRATCH * max(highest[0] for _, _, highest in shapes)


class Runtime:
    validity = (EngineValidity.VALID, 0)
    events: list[Any]
    captured: list[Any]

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def get_engine_validity(self, buffer: bytes) -> tuple[Any, int]:
        return self.validity

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            return ICudaEngine(json.loads(serialized_engine), self.events, self.captured)
        except ValueError:
            self.logger.log(ILogger.ERROR, "Serialization assertion failed: magicTag")
            return None


def library(rtx: bool, version: str = "11.0.0") -> Any:
    """A module of its own: what one test changes on its classes no other sees."""
    events: list[Any] = []
    captured: list[Any] = []
    runtime: Any = type("Runtime", (Runtime,), {"events": events, "captured": captured})
    names = (
        *("ILogger", "DataType", "ExecutionContextAllocationStrategy", "MemoryPoolType", "BuilderFlag"),
        *("NetworkDefinitionCreationFlag", "IOptimizationProfile"),
    )
    parts = {name: globals()[name] for name in names}
    parts |= {name: type(name, (globals()[name],), {}) for name in ("Builder", "OnnxParser")}
    if rtx:
        only = ("CudaGraphStrategy", "EngineValidity", "EngineInvalidityDiagnostics", "ComputeCapability")
        parts |= {name: globals()[name] for name in only}
    else:
        runtime.get_engine_validity = property()  # hasattr says no: TensorRT has it not
    module = ModuleType("stand_in_tensorrt_rtx" if rtx else "stand_in_tensorrt")
    module.__dict__.update(parts, __version__=version, Runtime=runtime, events=events, captured=captured)
    return module


# --- torch.cuda, whose streams and graphs note what is done in which order
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_120")


class StandIn(TensorRT):
    """The backend over a stand-in library, whose device is the CPU."""

    def __init__(self, library, rtx=False):
        super().__init__("tensorrt-rtx" if rtx else "tensorrt", "no_module", "10.15", "12", TARGETS if rtx else ())
        self._library = library

    def library(self):
        return self._library

    def unusable(self, device, dtype="float32"):
        return None


class Stream:
    """torch.cuda.Stream, whose waits are noted among what the library's stand-in did."""

    events: ClassVar[list] = []
    made: ClassVar[int] = 0

    def __init__(self, device=None, handle=None):
        Stream.made += 1
        self.cuda_stream = 100 + Stream.made if handle is None else handle

    def wait_stream(self, other):
        self.events.append(("wait", self.cuda_stream, other.cuda_stream))


class Graph:
    """torch.cuda.CUDAGraph: what the library was told to run while it was captured is run again by a replay."""

    replays = 0

    def __init__(self):
        self.launches = []

    def replay(self):
        Graph.replays += 1
        for launch in self.launches:
            launch()


def fake_cuda(monkeypatch, cache):
    """torch.cuda as far as plans need it: `stream` of the result is the current one, 0 the default; cache: a folder."""
    control = SimpleNamespace(stream=0, library=None, synchronised=0)

    @contextmanager
    def capture(graph):
        before, kept = control.stream, len(control.library.captured)
        control.stream = 55
        yield
        control.stream = before
        graph.launches = control.library.captured[kept:]

    def synchronize(device=None):
        control.synchronised += 1

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(handle=control.stream))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(tensorrt_plan, "_ALIGNMENT", ALIGNMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(Graph, "replays", 0)
    return control
