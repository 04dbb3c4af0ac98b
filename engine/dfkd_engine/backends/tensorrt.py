"""TensorRT, and TensorRT-RTX, which has the same interface: an ONNX file becomes a plan for one or several GPUs.

    tensorrt       times its kernels on the GPU that it builds for, so a plan is built where it runs
    tensorrt-rtx   compiles without a GPU, for several architectures at once; its kernels are finished when it is loaded

Networks are strongly typed: every tensor has the precision that the graph gives it (TensorRT 11 knows nothing else).
Two profiles: the planned rows as a fixed shape, for which kernels are chosen, and fewer rows. A plan is code; only
those of our own store are loaded, after their hash is verified.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from dfkd_engine.backends.packages import missing, versions
from dfkd_engine.devices import kind_of, targets_of
from dfkd_engine.errors import EngineError, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from dfkd_engine.backends import Device, Run
    from dfkd_engine.backends.tensorrt_plan import Profile
    from dfkd_engine.graph import Graph
    from dfkd_engine.spec import EngineSpec

PLAN, WAY = "engine.plan", "way.json"
WORKSPACE = "DFKD_TENSORRT_WORKSPACE_GIB"  # an environment variable: it belongs to a GPU, not to a run
_MODEL = "model.onnx"
_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}
_TURNS = 5


class TensorRT:
    """A backend that compiles through TensorRT or TensorRT-RTX, two libraries of nearly one interface.

    name: of the backend. module: what Python imports. oldest, newest: versions [oldest, newest) whose interface this is
    written for. targets: architectures that it can compile for without having one; () for none.
    """

    fixed_rows = True

    def __init__(self, name: str, module: str, oldest: str, newest: str, targets: tuple[str, ...] = ()) -> None:
        self.name, self.targets = name, targets
        self._module, self._oldest, self._newest = module, oldest, newest

    def unusable(self, device: "Device", dtype: str = "float32") -> str | None:
        device = str(device)
        if absent := missing(self._module, "onnx", "onnxscript"):
            extra = "rtx" if self.targets else "tensorrt"
            verb = "is" if len(absent) == 1 else "are"
            return f"{', '.join(absent)} {verb} not installed (pip install 'dfkd[{extra},onnx]')"
        installed = versions(self.name).get(self.name, "")
        if installed and not _number(self._oldest) <= _number(installed) < _number(self._newest):
            return f"it is written for {self.name} {self._oldest} up to {self._newest}, and {installed} is installed"
        if kind_of(device) != "cuda":
            ahead = f", or ahead of time for some with --target {','.join(self.targets)}" if self.targets else ""
            return f"it compiles for a CUDA device{ahead}, not for {device}"
        if asked := targets_of(device):
            if unknown := [target for target in asked if target not in self.targets]:
                can = ", ".join(self.targets) or "none: it times kernels on the GPU that a plan is for"
                return f"it cannot compile for {unknown[0]} without that GPU (it can for {can})"
            return None
        import torch

        return None if torch.cuda.is_available() else "torch finds no CUDA device"

    def versions(self) -> dict[str, str]:
        found = versions("torch", "onnx", "onnxscript", self.name)
        # CUDA and CPU builds of torch ("+cpu") write the same graph: a plan compiled ahead of time moves between them.
        return {name: version.partition("+")[0] for name, version in found.items()}

    def flags(self, device: "Device") -> dict[str, str]:
        return {"workspace_gib": f"{_workspace() / 2**30:g}", "tf32": "False", "profiles": "planned, fewer"}

    def compile(self, graph: "Graph", spec: "EngineSpec", folder: Path) -> None:
        from dfkd_engine.export import to_onnx

        # Below the payload, so that the disk that is meant for engines is the one that fills.
        with tempfile.TemporaryDirectory(dir=folder, prefix="work-") as work:
            to_onnx(graph, Path(work) / _MODEL)
            plan = self.build(Path(work) / _MODEL, spec)
        with (folder / PLAN).open("wb") as file:
            file.write(plan)

    def build(self, model: Path, spec: "EngineSpec") -> memoryview:
        """An ONNX file's plan for the spec's batch and device.

        Raises EngineError naming the node, and the layer it comes from, that the library refuses.
        """
        from dfkd_engine.backends.tensorrt_plan import cache_file, library_log, profiles, read_cache, write_cache

        trt = self.library()
        log = library_log(trt)
        builder = trt.Builder(log)
        typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(model)):
            found = [parser.get_error(i) for i in range(parser.num_errors)]
            raise self._refused(spec, model, [(e.node_name(), e.node_operator(), e.desc()) for e in found])
        _check_ends(trt, network, spec)
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 is meant where the graph says so
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _workspace())
        for profile in profiles(spec.rows):
            config.add_optimization_profile(_profile(builder, spec, profile))
        targets = targets_of(spec.device)
        if targets:
            config.num_compute_capabilities = len(targets)
            for place, target in enumerate(targets):
                config.set_compute_capability(getattr(trt.ComputeCapability, target.replace("sm_", "SM")), place)
        timings = None if self.targets else cache_file("timings", self.name, trt.__version__, spec.device)
        if timings is not None:
            config.set_flag(trt.BuilderFlag.EDITABLE_TIMING_CACHE)  # what was timed before decides again
            config.set_timing_cache(config.create_timing_cache(read_cache(timings)), False)
        log.clear()
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self._refused(spec, model, [log.blamed(_nodes(model))])
        if timings is not None:
            write_cache(timings, bytes(config.get_timing_cache().serialize()))
        return memoryview(plan)

    def load(self, folder: Path, spec: "EngineSpec", device: "Device") -> "Run":
        from dfkd_engine.backends.tensorrt_plan import Plan, captured

        as_graph = _as_graph(folder)
        plan = Plan(self.library(), (folder / PLAN).read_bytes(), spec, device, as_graph)
        return captured(plan) if as_graph and not plan.captures_itself else plan

    def tune(
        self, folder: Path, spec: "EngineSpec", device: "Device", arguments: "Sequence[Tensor]"
    ) -> dict[str, float]:
        """Time a call launch by launch and as a CUDA graph; the quicker is what `load` gives from now on.

        Returns milliseconds a call of each, the median of five.
        """
        import torch

        found = {}
        for as_graph in (False, True):
            (folder / WAY).write_text(json.dumps({"cuda_graph": as_graph}) + "\n")
            run = self.load(folder, spec, device)
            run(*arguments)
            spent = []
            for _ in range(_TURNS):
                torch.cuda.synchronize(device)
                started = time.perf_counter()
                run(*arguments)
                torch.cuda.synchronize(device)
                spent.append(1000 * (time.perf_counter() - started))
            found["cuda graph" if as_graph else "launches"] = round(median(spent), 3)
        best = found["cuda graph"] < found["launches"]
        (folder / WAY).write_text(json.dumps({"cuda_graph": best}) + "\n")
        return found

    def library(self) -> Any:
        """The module; raises EngineError where its shared libraries do not load."""
        try:
            return import_module(self._module)
        except (ImportError, OSError, RuntimeError) as error:
            todo = "install its libraries (pip takes those of tensorrt from NVIDIA's own package index)"
            raise EngineError(f"{self._module} cannot be imported", first_line(error), todo) from error

    def _refused(self, spec: "EngineSpec", model: Path, errors: Sequence[tuple[str, str, str]]) -> EngineError:
        """What the library said, with the layers of the nodes that it names: (node, operation, message)."""
        nodes = _nodes(model)
        parts = []
        for name, operation, message in errors:
            layer, operation_here = nodes.get(name, ("", ""))
            where = f" of the layer {layer}" if layer else ""
            made = f" ({operation_here})" if operation_here else ""
            parts.append(f"it refuses {operation or 'the node'} {name}{made}{where}: {message}" if name else message)
        what = f"{spec.network} cannot be compiled by {self.name} {self.library().__version__}"
        if any("memory" in message.lower() or "workspace" in message for _, _, message in errors):
            allowed = f"{_workspace() / 2**30:g} GiB"
            todo = f"plan fewer rows with --batch, or allow other than {allowed} of scratch with {WORKSPACE}"
            return EngineError(what, "; ".join(parts), todo)
        todo = "use another backend for it, or write the layer with other operations"
        return EngineError(what, "; ".join(parts), todo)


def _profile(builder: Any, spec: "EngineSpec", rows: "Profile") -> Any:
    profile = builder.create_optimization_profile()
    for tensor in spec.inputs:
        if tensor.batched:
            profile.set_shape(tensor.name, *((count, *tensor.shape[1:]) for count in rows))
    return profile


def _check_ends(trt: Any, network: Any, spec: "EngineSpec") -> None:
    """Raises EngineError where inputs or outputs are not those of the spec: bindings go by name and dtype."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for found, wanted, kind in ((inputs, spec.inputs, "inputs"), (outputs, spec.outputs, "outputs")):
        here = [(tensor.name, tensor.dtype) for tensor in found]
        there = [(tensor.name, getattr(trt.DataType, _TYPES[tensor.dtype])) for tensor in wanted]
        if sorted(here, key=lambda pair: pair[0]) != sorted(there, key=lambda pair: pair[0]):
            why = f"its {kind} are {here}, wanted are {there}"
            raise EngineError(f"{spec.network}: the parsed network is another one", why, "report it")


def _nodes(model: Path) -> dict[str, tuple[str, str]]:
    """ONNX node name -> (layer, operation of the graph), as `export.to_onnx` writes them."""
    import onnx

    found = {}
    for node in onnx.load(model, load_external_data=False).graph.node:
        said = {entry.key: entry.value for entry in node.metadata_props}
        found[node.name] = said.get("module", ""), said.get("operation", "")
    return found


def _as_graph(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / WAY).read_text())["cuda_graph"])
    except FileNotFoundError:
        return False


def _workspace() -> int:
    """Bytes of scratch memory that a plan may need, at most.

    Where a network is fused whole, that is all its tensors and not a kernel's buffer alone: Stable Diffusion 1.5's
    gradient at 512x512 wants 12 GiB for two images. So the bound is wide, and narrowed by hand on a GPU that is shared.
    """
    said = os.environ.get(WORKSPACE) or "64"
    try:
        gib = float(said)
    except ValueError:
        gib = 0.0
    if not 0 < gib < float("inf"):
        raise EngineError(f"{WORKSPACE} is {said!r}", "it is a number of GiB above 0", "set it to one, or unset it")
    return round(gib * 2**30)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


TENSORRT = TensorRT("tensorrt", "tensorrt", "10.15", "12")
TENSORRT_RTX = TensorRT(
    "tensorrt-rtx",
    "tensorrt_rtx",
    "1.7",
    "2",
    targets=("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121") if sys.platform != "darwin" else (),
)
