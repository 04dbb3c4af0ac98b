"""Torch's compiler: fused C++ loops on a CPU, Triton kernels on a GPU, convolutions and matmuls from the libraries.

A stored engine is an AOTInductor package (`engine.pt2`): a zip of one shared library, in which the weights are too, and
JSON. It holds machine code for this CPU or GPU, so the spec's device is part of its key.
"""

import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
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
        if (why := _no_compiler(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))) is not None:
            return why
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
        with _own_cache(folder), quiet():
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


@cache
def _no_compiler(name: str) -> str | None:
    """Why the C++ compiler of this name compiles nothing, as far as it tells without being given anything."""
    install = "install g++, or name yours in CXX"
    if shutil.which(name) is None:
        return f"it needs a C++ compiler and finds no {name} ({install})"
    try:
        status = subprocess.run([name, "--version"], capture_output=True, timeout=60).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"it needs a C++ compiler, and {name} cannot be started: {first_line(error)} ({install})"
    return f"it needs a C++ compiler, and {name} --version ends with status {status} ({install})" if status else None


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch's parts say to one another while they compile."""
    log = logging.getLogger("torch._inductor.utils")  # of a failure: that files are kept, which are removed here
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
            yield
    finally:
        log.setLevel(before)


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """Let inductor and Triton work in a folder of their own below `folder`, removed at the end.

    Below, so that the disk that is meant for engines is the one that fills, and whoever sweeps up after a killed build
    finds it.
    """
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(dir=folder, prefix="work-") as work, _plain_path(work) as place:
        os.environ.update(dict(zip(names, (place, f"{place}/triton"), strict=True)))
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextmanager
def _plain_path(folder: str) -> Iterator[str]:
    """A path of `folder` that needs no quotes: torch writes the compiler's command as text and splits it at spaces.

    A link in the folder of temporary files where its own path has spaces or the like. Raises EngineError where that
    folder has them too.
    """
    folder = os.path.abspath(folder)
    if shlex.quote(folder) == folder:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="dfkd-") as place:
        if shlex.quote(place) != place:
            what, why = f"inductor cannot work in {folder}", "its compiler takes no path with spaces or quotes"
            raise EngineError(what, why, f"set TMPDIR to a folder without them, instead of {tempfile.gettempdir()}")
        link = os.path.join(place, "work")
        os.symlink(folder, link)
        yield link
