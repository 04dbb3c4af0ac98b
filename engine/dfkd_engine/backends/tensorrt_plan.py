"""A TensorRT plan as a function of torch's tensors: bound in place, on torch's stream, in torch's memory.

Nothing is copied and nothing waits: a call enqueues. Scratch memory comes from torch's allocator for the length of a
call, so all engines share it and a lack of it is torch.OutOfMemoryError.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfkd_engine.devices import architecture
from dfkd_engine.errors import EngineError
from dfkd_engine.files import replace_file
from dfkd_engine.spec import rows_of

if TYPE_CHECKING:
    from dfkd_engine.backends import Run
    from dfkd_engine.spec import EngineSpec, TensorSpec

Profile = tuple[int, int, int]

_ALIGNMENT = 256  # what TensorRT takes for granted of an address
_REBUILD = "build it again with dfkd-engines build"


class Plan:
    """A deserialised plan.

    as_graph: whether the library is to replay its launches as one CUDA graph; only TensorRT-RTX does that itself
    (`captures_itself`).

    Raises EngineError: the plan is damaged, of another version, or for another GPU.
    """

    def __init__(
        self, trt: Any, plan: bytes, spec: "EngineSpec", device: torch.device | str, as_graph: bool = False
    ) -> None:
        self.spec, self.device, self._trt, self._log = spec, torch.device(device), trt, library_log(trt)
        self.captures_itself = hasattr(trt, "CudaGraphStrategy")
        self._what = f"{spec.network} {spec.key()}"
        self._log.clear()
        with torch.cuda.device(self.device):
            self._runtime = trt.Runtime(self._log)
            self._check_validity(plan)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                said = self._log.said() or "no reason given"
                why = f"{spec.backend} {trt.__version__} does not take its plan ({said})"
                raise EngineError(f"{self._what} cannot be loaded", why, _REBUILD)
            self._check_profiles()
            self._config = self._runtime_config(as_graph)
        self._contexts: dict[int, Any] = {}
        self._side: torch.cuda.Stream | None = None

    def __call__(self, *tensors: Tensor, out: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """`out`: results of an earlier call to write to; without them the results are new."""
        rows = rows_of(tensors, self.spec.inputs)
        profile = self._profile_of(rows)
        with torch.cuda.device(self.device):
            arguments = [_aligned(tensor) for tensor in tensors]
            results = tuple(out or (self._empty(wanted, rows) for wanted in self.spec.outputs))
            scratch = self._scratch(profile)
            with self._stream() as stream:
                first = profile not in self._contexts
                context = self._context(profile, stream)
                context.set_device_memory(scratch.data_ptr(), scratch.numel())
                for tensor, wanted in zip(arguments, self.spec.inputs, strict=True):
                    self._require(context.set_input_shape(wanted.name, tuple(tensor.shape)), wanted.name, rows)
                for tensor, wanted in zip((*arguments, *results), (*self.spec.inputs, *self.spec.outputs), strict=True):
                    self._require(context.set_tensor_address(wanted.name, tensor.data_ptr()), wanted.name, rows)
                if not context.execute_async_v3(stream):
                    raise self._failed(rows)
            if first and self.captures_itself:  # it has finished its kernels for this GPU: spare the next process that
                write_cache(self._kernels(), bytes(self._config.get_runtime_cache().serialize()))
        return results

    def _check_validity(self, plan: bytes) -> None:
        """TensorRT-RTX alone tells from a plan's head why it cannot run here."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, diagnostics = self._runtime.get_engine_validity(plan)
        if validity == self._trt.EngineValidity.INVALID:
            reasons = self._trt.EngineInvalidityDiagnostics.__members__.items()
            why = ", ".join(name.lower().replace("_", " ") for name, bit in reasons if diagnostics & int(bit))
            why = f"its plan is not for {architecture(self.device)} ({why or self._log.said() or 'no reason given'})"
            raise EngineError(f"{self._what} cannot be loaded", why, _REBUILD)

    def _check_profiles(self) -> None:
        wanted, found = len(profiles(self.spec.rows)), self._engine.num_optimization_profiles
        if found != wanted:
            why = f"its plan has {found} profiles, its spec asks for {wanted}"
            raise EngineError(f"{self._what} cannot be loaded", why, _REBUILD)

    def _runtime_config(self, as_graph: bool) -> Any:
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.captures_itself:
            strategy = self._trt.CudaGraphStrategy
            config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if as_graph else strategy.DISABLED
            kernels = config.create_runtime_cache()
            if known := read_cache(self._kernels()):
                kernels.deserialize(known)
            config.set_runtime_cache(kernels)
        return config

    def _kernels(self) -> Any:
        words = (self.spec.backend, self._trt.__version__, architecture(self.device), self.spec.key())
        return cache_file("kernels", *words)

    def _profile_of(self, rows: int) -> int:
        ranges = profiles(self.spec.rows)
        fitting = [place for place, (low, _, high) in enumerate(ranges) if low <= rows <= high]
        if not fitting:
            why = f"its profiles are {', '.join(f'{low} to {high}' for low, _, high in ranges)} rows"
            raise EngineError(f"{self._what} cannot take {rows} rows", why, "call it with a number that fits")
        return fitting[0]

    def _scratch(self, profile: int) -> Tensor:
        size = int(self._engine.get_device_memory_size_for_profile_v2(profile))
        return torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)

    def _context(self, profile: int, stream: int) -> Any:
        """A context a profile: a change of profile would wait for the device."""
        if profile not in self._contexts:
            context = self._engine.create_execution_context(self._config)
            if context is None:
                raise EngineError(f"{self._what} cannot run", self._log.said() or "no context was made", _REBUILD)
            self._require(context.set_optimization_profile_async(profile, stream), f"profile {profile}", 0)
            self._contexts[profile] = context
        return self._contexts[profile]

    @contextmanager
    def _stream(self) -> Iterator[int]:
        """The handle of torch's current stream, or of one between two points of it.

        On the legacy default stream TensorRT waits for the device at every call, so those calls take a stream of their
        own, which begins after what was enqueued before and which what comes after waits for. Memory stays torch's:
        whoever reuses it is enqueued later.
        """
        current = torch.cuda.current_stream(self.device)
        if current.cuda_stream:
            yield current.cuda_stream
            return
        if self._side is None:
            self._side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._side.wait_stream(current)
        try:
            yield self._side.cuda_stream
        finally:
            current.wait_stream(self._side)

    def _empty(self, wanted: "TensorSpec", rows: int) -> Tensor:
        return torch.empty(wanted.sizes(rows), dtype=getattr(torch, wanted.dtype), device=self.device)

    def _require(self, done: bool, name: str, rows: int) -> None:
        if not done:
            raise self._failed(rows, f"{name}: ")

    def _failed(self, rows: int, name: str = "") -> EngineError:
        why = f"{name}{self._log.said() or 'TensorRT gave no reason'}"
        return EngineError(f"{self._what} failed at {rows} rows", why, "verify it with dfkd-engines verify")


def captured(plan: Plan) -> "Run":
    """A plan whose calls are replayed as CUDA graphs, one for every number of rows, on buffers of their own.

    A graph holds addresses, so arguments are copied in and results out: little beside a network.
    """
    graphs: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor], tuple[Tensor, ...]]] = {}

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        rows = rows_of(tensors, plan.spec.inputs)
        if rows not in graphs:
            arguments = [tensor.clone() for tensor in tensors]
            results = plan(*arguments)  # the first call of a shape may allocate and load: not to be captured
            torch.cuda.synchronize(plan.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(plan.device), torch.cuda.graph(graph):
                plan(*arguments, out=results)
            graphs[rows] = graph, arguments, results
        graph, arguments, results = graphs[rows]
        for mine, given in zip(arguments, tensors, strict=True):
            mine.copy_(given)
        graph.replay()
        return tuple(result.clone() for result in results)

    return run


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def profiles(batch: tuple[int, int, int]) -> tuple[Profile, ...]:
    """(smallest, best, largest) rows of the profiles for a spec's batch: the planned rows alone, then all others.

    A call of one row is computed as two (`compiled.Engine`). Half of the planned rows is what the others are best at:
    a step without classifier-free guidance, or a call that was halved for want of memory.
    """
    planned = max(batch[1], 2)
    largest = max(batch[2], planned)
    others = largest if largest > planned else planned - 1
    fixed = (planned, planned, planned)
    return (fixed,) if others < 2 else (fixed, (2, max(2, planned // 2), others))


@cache
def library_log(trt: Any) -> Any:
    """The one logger that all builders and runtimes of a process share: it keeps errors and passes nothing on."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

        def clear(self) -> None:
            self.errors.clear()

        def said(self) -> str:
            """The last error, "" where there was none."""
            return self.errors[-1] if self.errors else ""

        def blamed(self, nodes: dict[str, Any]) -> tuple[str, str, str]:
            """(node, "", message) of the first error that names a node, or ("", "", what was said last)."""
            for message in self.errors:
                named = [name for name in nodes if name and name in message.replace("'", " ").split()]
                if named:
                    return max(named, key=len), "", message
            return "", "", self.said() or "it gave no reason"

    return Log()


def cache_file(*words: str) -> Path:
    """The file in the user's cache folder where a library keeps timings and kernels of this machine.

    words: make the name, such as the library's name, its version and the device. The cache folder is the place, since
    these belong to a GPU and a driver, no engine depends on them, and what is lost there costs time alone.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "dfkd" / re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(words))


def read_cache(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def write_cache(file: Path, content: bytes) -> None:
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, lambda stream: stream.write(content))
