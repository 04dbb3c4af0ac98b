"""ONNX Runtime on CPU and CUDA. A stored engine is the ONNX file; it is optimised for the machine when it is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfkd_engine.backends.packages import missing, versions
from dfkd_engine.devices import kind_of
from dfkd_engine.errors import EngineError, first_line
from dfkd_engine.spec import rows_of

if TYPE_CHECKING:
    import torch

    from dfkd_engine.backends import Device, Run
    from dfkd_engine.graph import Graph
    from dfkd_engine.spec import EngineSpec

MODEL = "model.onnx"
# Of the messages of an arena, the C++ library, CUDA and cuBLAS: it has no type of exception for this.
SHORT_MEMORY = ("Failed to allocate memory", "bad_alloc", "bad allocation", "out of memory", "ALLOC_FAILED")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntime:
    name = "onnxruntime"
    fixed_rows = False
    targets: tuple[str, ...] = ()

    def unusable(self, device: "Device", dtype: str = "float32") -> str | None:
        if absent := missing("onnx", "onnxscript", "onnxruntime"):
            verb = "is" if len(absent) == 1 else "are"
            return f"{', '.join(absent)} {verb} not installed (pip install 'dfkd[onnx]')"
        kind = kind_of(device)
        if kind not in PROVIDERS:
            return f"it runs on cpu and cuda, not on {kind}"
        if dtype == "bfloat16":
            return "ONNX has bfloat16 convolutions from opset 22 on, and models are written in opset 18 (use float16)"
        import onnxruntime

        if PROVIDERS[kind] not in onnxruntime.get_available_providers():
            here = f"onnxruntime {onnxruntime.__version__}"
            return f"{here} comes without {PROVIDERS[kind]} (pip install onnxruntime-gpu in its place)"
        return None

    def versions(self) -> dict[str, str]:
        return versions("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")

    def flags(self, device: "Device") -> dict[str, str]:
        return {"optimisation": "all", "provider": PROVIDERS.get(kind_of(device), "none")}

    def compile(self, graph: "Graph", spec: "EngineSpec", folder: Path) -> None:
        from dfkd_engine.export import to_onnx

        to_onnx(graph, folder / MODEL)

    def load(self, folder: Path, spec: "EngineSpec", device: "Device") -> "Run":
        import torch

        place = torch.device(device)
        session = _session(folder / MODEL, spec, place)
        index = place.index or 0

        def bound(tensor: torch.Tensor) -> tuple[str, int, type, list[int], int]:
            return place.type, index, _element(tensor.dtype), list(tensor.shape), tensor.data_ptr()

        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            rows = rows_of(tensors, spec.inputs)
            results = tuple(
                torch.empty(result.sizes(rows), dtype=getattr(torch, result.dtype), device=place)
                for result in spec.outputs
            )
            binding = session.io_binding()  # the memory of torch's tensors itself: nothing is copied
            for tensor, wanted in zip(tensors, spec.inputs, strict=True):
                binding.bind_input(wanted.name, *bound(tensor))
            for tensor, result in zip(results, spec.outputs, strict=True):
                binding.bind_output(result.name, *bound(tensor))
            if place.type == "cuda":  # ONNX Runtime works on a stream of its own and waits for that at the end of a run
                torch.cuda.current_stream(place).synchronize()
            try:
                session.run_with_iobinding(binding)
            except Exception as error:  # its exceptions share no other base
                if any(words in str(error) for words in SHORT_MEMORY):
                    raise torch.OutOfMemoryError(f"{spec.network}: {_in_short(error)}") from error
                raise
            return results

        return run


def _session(path: Path, spec: "EngineSpec", device: "torch.device") -> Any:
    """A session whose only provider for networks is the one of `device`; raises EngineError."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; what it says of its own rewriting helps nobody here
    # Eight bits are computed wide, on the quantised values. Its integer kernels take a layer here and there, which was
    # slower as a whole, overflow on x86 CPUs without VNNI, and are put in for fp8 too, which they then refuse to load.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    provider = PROVIDERS[device.type]
    settings: dict[str, Any] = {}
    if device.type == "cuda":
        settings = {"device_id": device.index or 0, "use_tf32": 0}
    what = f"{spec.network} {spec.key()} cannot be loaded"
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[(provider, settings)])
    except Exception as error:  # its exceptions share no other base
        why = f"onnxruntime {onnxruntime.__version__} does not take its model ({first_line(error)})"
        raise EngineError(what, why, "build it again with dfkd-engines build") from error
    used = session.get_providers()
    if used[:1] != [provider]:
        # A provider whose libraries do not load is left out with no more than a warning.
        why = f"ONNX Runtime fell back to {', '.join(used)}: the libraries of {provider} do not load here"
        raise EngineError(what, why, "install the CUDA and cuDNN that onnxruntime-gpu was built for")
    return session


def _in_short(error: Exception) -> str:
    """The end of a message of ONNX Runtime, past the node and its own source files."""
    return first_line(error).rpartition(") ")[2]


def _element(dtype: "torch.dtype") -> type:
    """An element type as ONNX Runtime's bindings take it."""
    import numpy
    import torch

    return {torch.float32: numpy.float32, torch.float16: numpy.float16, torch.int64: numpy.int64}[dtype]
