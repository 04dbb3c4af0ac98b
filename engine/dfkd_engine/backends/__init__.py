"""What runs a graph: one contract, one object a backend.

    inductor         torch's compiler; stored as an AOTInductor package: code and weights in one shared library
    onnxruntime      stored as an ONNX file, which holds no code
    tensorrt         stored as a plan for one GPU; tensorrt-rtx: for several architectures, also without a GPU
    torch-tensorrt   a plan too, converted from the operations themselves, without ONNX

Nothing here imports torch, onnxruntime or TensorRT before a backend compiles or loads.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from dfkd_engine.backends.inductor import Inductor
from dfkd_engine.backends.onnxruntime import OnnxRuntime
from dfkd_engine.backends.tensorrt import TENSORRT, TENSORRT_RTX
from dfkd_engine.backends.torch_tensorrt import TorchTensorRT
from dfkd_engine.errors import COMMAND_OUTPUT, EngineError, compiler_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dfkd_engine.graph import Graph
    from dfkd_engine.spec import EngineSpec

Device: TypeAlias = "torch.device | str"
Run: TypeAlias = "Callable[..., tuple[Tensor, ...]]"


class Backend(Protocol):
    """One way to run a graph. Compile with `compile_graph`, and call what is loaded through `compiled.Engine`.

    name: as in EngineSpec.backend. fixed_rows: whether it compiles for the planned rows of a call, and a larger call
    needs another engine. targets: GPU architectures that it can compile for on a machine without one.
    """

    name: str
    fixed_rows: bool
    targets: tuple[str, ...]

    def unusable(self, device: Device, dtype: str = "float32") -> str | None:
        """Why it cannot compile or run networks of `dtype` on `device` here, and what would change that; None: it can.

        device: also a family of targets (`devices.family`), which nothing can be run on.
        """

    def versions(self) -> dict[str, str]:
        """Versions of the packages that change what it compiles, from their metadata: nothing is imported."""

    def flags(self, device: Device) -> dict[str, str]:
        """Options that change what it compiles."""

    def compile(self, graph: "Graph", spec: "EngineSpec", folder: Path) -> None:
        """Write the payload into `folder`, which is empty, for 2 rows to the spec's largest.

        It is called where `unusable` has nothing to say. Whatever a compiler raises may pass through.
        """

    def load(self, folder: Path, spec: "EngineSpec", device: Device) -> Run:
        """The payload as a function of contiguous tensors on `device`, in the spec's order.

        It is called where `unusable` has nothing to say. The function's results are new tensors at every call. Raises
        EngineError where the payload cannot be loaded.
        """


@runtime_checkable
class Tunable(Protocol):
    """A backend whose payload can be run in more than one way."""

    def tune(self, folder: Path, spec: "EngineSpec", device: Device, arguments: "Sequence[Tensor]") -> dict[str, float]:
        """Time the ways on `device` and note the quickest in `folder` for `load`; milliseconds a call of each."""


BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (Inductor(), OnnxRuntime(), TENSORRT, TENSORRT_RTX, TorchTensorRT())
}


def get(name: str) -> Backend:
    """The backend of this name; raises EngineError with the known names."""
    if name not in BACKENDS:
        raise EngineError(f"the backend {name!r} is unknown", f"known are {', '.join(BACKENDS)}", "choose one of them")
    return BACKENDS[name]


def compile_graph(backend: Backend, graph: "Graph", spec: "EngineSpec", folder: Path) -> None:
    """Write the payload of an engine into `folder`, which is empty.

    Raises EngineError: the backend cannot be used here, or its compiler fails, whose own words are the reason. An
    OSError, such as that of a full disk, passes through.
    """
    what = f"{spec.network} cannot be compiled by {backend.name}"
    if (why := backend.unusable(spec.device, spec.dtype)) is not None:
        raise EngineError(what, why, "or choose another backend")
    try:
        backend.compile(graph, spec, folder)
    except (EngineError, OSError):
        raise
    except Exception as error:  # compilers share no base of their exceptions
        why = f"its compiler stopped ({compiler_line(error)})"
        todo = "see to the C++ compiler" if COMMAND_OUTPUT in str(error) else "report it with the network"
        raise EngineError(what, why, f"choose another backend for it, or {todo}") from error
