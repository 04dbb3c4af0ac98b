"""TensorRT by way of torch_tensorrt, which converts ATen operations itself instead of reading ONNX. CUDA only.

A stored engine is the TensorRT plan (`engine.plan`) and the names of its tensors (`bindings.json`): the formats of
torch_tensorrt.save hold the compilation settings as a pickle, and a plan is read by TensorRT alone.

The whole graph becomes one plan, or there is none. dynamo.compile partitions a graph instead, and gives what is smaller
than min_block_size to PyTorch even where require_full_compilation is set.
"""

import inspect
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfkd_engine.backends.packages import missing, versions
from dfkd_engine.devices import kind_of, targets_of
from dfkd_engine.errors import EngineError, first_line

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from dfkd_engine.backends import Device, Run
    from dfkd_engine.graph import Graph
    from dfkd_engine.spec import EngineSpec, TensorSpec

PLAN, BINDINGS = "engine.plan", "bindings.json"

OPTIONS: dict[str, Any] = {
    "workspace_size": 64 << 30,  # bytes; a network that is fused whole keeps all its tensors in it
    "disable_tf32": True,  # float32 is what the graph says; ten bits of it miss the tolerance of float32
    "use_fp32_acc": False,  # it would put casts around the graph's own precision
    "truncate_double": False,
    "immutable_weights": True,  # a plan that can be refitted is slower, and a change of weights is another engine here
    # Its cache knows a graph without arguments, weights, architecture and version.
    "cache_built_engines": False,
    "reuse_cached_engines": False,
}
# Where typing could still be weak (2.11 and 2.12); from 2.13 on there is no other than the graph's.
_TYPED = {"use_explicit_typing": True}


class TorchTensorRT:
    name = "torch-tensorrt"
    fixed_rows = True  # kernels are chosen for the planned rows; fewer are allowed
    targets: tuple[str, ...] = ()

    def unusable(self, device: "Device", dtype: str = "float32") -> str | None:
        if kind_of(device) != "cuda":
            return f"it runs on cuda, not on {kind_of(device)}"
        if targets_of(str(device)):
            return "it times kernels on the GPU that a plan is for, and compiles for no other"
        if absent := missing("torch_tensorrt", "tensorrt"):
            verb = "is" if len(absent) == 1 else "are"
            return f"{', '.join(absent)} {verb} not installed (pip install 'dfkd[tensorrt]')"
        own = versions("torch", "torch-tensorrt")
        torch_release, its_release = (_release(own.get(name, "none")) for name in ("torch", "torch-tensorrt"))
        if torch_release != its_release:
            here = f"torch-tensorrt {own.get('torch-tensorrt')} wants torch {its_release}, here is {own.get('torch')}"
            return f"{here} (pip install 'torch-tensorrt=={torch_release}.*')"
        import torch

        if not torch.cuda.is_available():  # torch_tensorrt asks for one when it is imported, and fails
            return "torch finds no CUDA device"
        return None

    def versions(self) -> dict[str, str]:
        return versions("torch", "torch-tensorrt", "tensorrt", "tensorrt-cu13-libs")

    def flags(self, device: "Device") -> dict[str, str]:
        return {name: str(value) for name, value in (OPTIONS | _TYPED).items()}

    def compile(self, graph: "Graph", spec: "EngineSpec", folder: Path) -> None:
        from dfkd_engine.export import to_program

        torch_tensorrt = _imported(f"{spec.network} cannot be compiled by torch-tensorrt")
        convert = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine
        timing = folder / "timing.cache"  # by default a file in /tmp that decides kernels, whoever wrote it
        place = torch_tensorrt.Device(gpu_id=_index(next((x.device for x in graph.module.buffers()), "cuda")))
        options = {**OPTIONS, "timing_cache_path": str(timing), "device": place}
        known = inspect.signature(convert).parameters
        options |= {name: value for name, value in _TYPED.items() if name in known}
        require_known(options, convert, torch_tensorrt.dynamo.CompilationSettings, torch_tensorrt.__version__)
        _, planned, largest = (max(rows, 2) for rows in spec.rows)
        program = to_program(graph, planned, largest)
        _scale_by_factors(program)
        inputs = [_input(torch_tensorrt, tensor, planned, largest) for tensor in spec.inputs]
        plan = convert(program, inputs, **options)
        names = {
            "inputs": list(program.graph_signature.user_inputs),
            "outputs": [f"output{index}" for index in range(len(spec.outputs))],
        }
        timing.unlink(missing_ok=True)
        (folder / PLAN).write_bytes(plan)
        (folder / BINDINGS).write_text(json.dumps(names) + "\n")

    def load(self, folder: Path, spec: "EngineSpec", device: "Device") -> "Run":
        import torch

        what = f"{spec.network} {spec.key()} cannot be loaded"
        torch_tensorrt = _imported(what)
        place = torch_tensorrt.Device(gpu_id=_index(device))
        try:
            names = json.loads((folder / BINDINGS).read_text())
            module = torch_tensorrt.runtime.TorchTensorRTModule(
                (folder / PLAN).read_bytes(),
                names["inputs"],
                names["outputs"],
                name=spec.network,
                settings=torch_tensorrt.dynamo.CompilationSettings(device=place),
            )
            module.set_output_tensors_as_unowned(True)  # results are the caller's, never memory that a call reuses
        except Exception as error:  # its exceptions share no other base
            why = f"torch-tensorrt {torch_tensorrt.__version__} does not take its plan ({first_line(error)})"
            raise EngineError(what, why, "build it again with dfkd-engines build") from error

        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            result = module(*tensors)  # on torch's current stream
            return (result,) if isinstance(result, torch.Tensor) else tuple(result)

        return run


def require_known(options: Mapping[str, Any], function: Any, settings: type, version: str) -> None:
    """Raise EngineError where an option does nothing: torch_tensorrt's functions swallow unknown ones as **kwargs, and
    take removed ones that no field of their settings holds any more."""
    named = {p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD}
    acting = named & {field.name for field in fields(settings)}
    if unknown := sorted(options.keys() - acting):
        what = f"torch-tensorrt {version} cannot be told {', '.join(unknown)}"
        why = "it has no such option, and would go on without a word"
        raise EngineError(what, why, "install a version from 2.11 to 2.14, or choose another backend")


def _scale_by_factors(program: "ExportedProgram") -> None:
    """Nearest upsampling by factors, in place: the one form of it that torch_tensorrt converts at any batch."""
    import torch

    aten = torch.ops.aten
    for node in program.graph.nodes:
        if node.target is aten.upsample_nearest2d.default:
            source, (rows, columns) = node.args[0], node.args[1]
            height, width = source.meta["val"].shape[2:]
            node.target = aten.upsample_nearest2d.vec
            node.args, node.kwargs = (source, None, [rows / height, columns / width]), {}
    program.graph_module.recompile()


def _input(torch_tensorrt: Any, tensor: "TensorSpec", planned: int, largest: int) -> Any:
    import torch

    dtype = getattr(torch, tensor.dtype)
    if not tensor.batched:
        return torch_tensorrt.Input(shape=tensor.sizes(0), dtype=dtype)
    smallest, best, most = (tensor.sizes(rows) for rows in (2, planned, largest))
    return torch_tensorrt.Input(min_shape=smallest, opt_shape=best, max_shape=most, dtype=dtype)


def _index(device: "Device") -> int:
    import torch

    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index


def _imported(what: str) -> Any:
    try:
        import torch_tensorrt
    except Exception as error:  # such as TensorRT's libraries, which its wheels fetch from elsewhere
        why = f"torch_tensorrt is installed and does not load ({first_line(error)})"
        raise EngineError(what, why, "reinstall it, or choose another backend") from error
    return torch_tensorrt


def _release(version: str) -> str:
    """ "2.13.0+cu130" -> "2.13"."""
    return ".".join(version.split("+")[0].split(".")[:2])
