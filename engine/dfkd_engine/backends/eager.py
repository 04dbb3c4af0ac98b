"""Torch's own kernels, one op after another: the backend that is always there."""

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dfkd_engine.backends.packages import versions
from dfkd_engine.errors import EngineError

if TYPE_CHECKING:
    from dfkd_engine.backends import Device
    from dfkd_engine.graph import Graph
    from dfkd_engine.spec import EngineSpec


class Eager:
    """Runs a traced graph as it is, or the function that it was traced from; there is nothing to compile or to load."""

    name = "eager"
    stored = False
    fixed_rows = False
    targets: tuple[str, ...] = ()

    def unusable(self, device: "Device", dtype: str = "float32") -> None:
        return None

    def versions(self) -> dict[str, str]:
        return versions("torch")

    def flags(self, device: "Device") -> dict[str, str]:
        return {}

    def compile(self, graph: "Graph", spec: "EngineSpec", folder: Path) -> NoReturn:
        raise _refused(spec)

    def load(self, folder: Path, spec: "EngineSpec", device: "Device") -> NoReturn:
        raise _refused(spec)


def _refused(spec: "EngineSpec") -> EngineError:
    why = "the backend eager runs a network as it is and has no files"
    return EngineError(f"{spec.network} cannot be stored", why, "call the network or its graph")
