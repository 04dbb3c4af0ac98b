"""Torch's compiler: fused C++ loops on a CPU, Triton kernels on a GPU, convolutions and matmuls from the libraries.

A stored engine is an AOTInductor package (`engine.pt2`): a zip of one shared library, in which the weights are too, and
JSON. It holds machine code for this CPU or GPU, so the spec's device is part of its key.
"""

import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfkd_engine.backends.packages import missing, versions
from dfkd_engine.devices import kind_of
from dfkd_engine.errors import EngineError, first_line

if TYPE_CHECKING:
    from dfkd_engine.backends import Device, Run
    from dfkd_engine.graph import Graph
    from dfkd_engine.spec import EngineSpec

PACKAGE = "engine.pt2"

# Written out where they are the default too, since environment variables change inductor's defaults unseen.
_OPTIONS: dict[str, Any] = {
    "freezing": True,  # weights are constants: convolutions get them in the library's own layout, foldable ops go
    "max_autotune": False,
    "force_disable_caches": True,  # what an earlier compilation left behind decides nothing
    "cpp.dynamic_threads": True,  # otherwise the builder's thread count is compiled in
    "aot_inductor.package_constants_in_so": True,
    "aot_inductor.precompile_headers": False,  # they would be compiled for one engine and thrown away
}


class Inductor:
    name = "inductor"
    fixed_rows = False
    targets: tuple[str, ...] = ()

    def unusable(self, device: "Device", dtype: str = "float32") -> str | None:
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            return f"it needs a C++ compiler and finds no {compiler} (install g++, or name yours in CXX)"
        if kind_of(device) == "cuda" and missing("triton"):
            return "it needs triton for a GPU, which is not installed (pip install triton)"
        return None

    def versions(self) -> dict[str, str]:
        return versions("torch")

    def flags(self, device: "Device") -> dict[str, str]:
        options = {name: str(value) for name, value in _options(device).items()}
        return options | (versions("triton") if kind_of(device) == "cuda" else {})

    def compile(self, graph: "Graph", spec: "EngineSpec", folder: Path) -> None:
        from torch._inductor import aoti_compile_and_package

        from dfkd_engine.export import to_program

        program = to_program(graph, *spec.rows[1:])
        with _own_cache(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what torch's parts say to one another
            aoti_compile_and_package(
                program, package_path=str(folder / PACKAGE), inductor_configs=_options(spec.device)
            )

    def load(self, folder: Path, spec: "EngineSpec", device: "Device") -> "Run":
        import torch
        from torch._inductor import aoti_load_package

        if "group_norm" in spec.flags:
            import dfkd_kernels.group_norm_silu  # noqa: F401 (its code calls the operations that this registers)

        place = torch.device(device)
        index = -1 if place.type == "cpu" else torch.cuda.current_device() if place.index is None else place.index
        try:
            package = aoti_load_package(str(folder / PACKAGE), device_index=index)
        except (OSError, RuntimeError) as error:
            why = f"torch {torch.__version__} does not take its package ({first_line(error)})"
            todo = "build it again with dfkd-engines build"
            raise EngineError(f"{spec.network} {spec.key()} cannot be loaded", why, todo) from error

        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(package(*tensors))

        return run


def _options(device: "Device") -> dict[str, Any]:
    # Convolutions in channels_last: what tensor cores want. On a CPU oneDNN has a blocked layout of its own, and the
    # copies around attention and normalisation made the embedded UNet 1.7 times slower.
    return _OPTIONS | {"layout_optimization": kind_of(device) == "cuda"}


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """Let inductor and Triton work in a folder of their own below `folder`, removed at the end.

    Below, so that the disk that is meant for engines is the one that fills, and whoever sweeps up after a killed build
    finds it.
    """
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(dir=folder, prefix="work-") as work:
        os.environ.update(dict(zip(names, (work, f"{work}/triton"), strict=True)))
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
