"""Functions of one tiny network, a loss with a field, and backends that take no time: no prior, no teacher."""

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd.compiled.functions import Function
from dfkd.extension import described
from dfkd_engine.backends import get
from dfkd_engine.manifest import MANIFEST
from dfkd_engine.spec import TensorSpec
from dfkd_engine.store import EngineStore

BACKEND = "onnxruntime"  # compiles in a second, where inductor takes half a minute
NEEDS_IT = pytest.mark.skipif(get(BACKEND).unusable("cpu") is not None, reason=str(get(BACKEND).unusable("cpu")))
IMAGE = TensorSpec("image", (None, 3, 4, 4), "float32")


class Network(nn.Module):
    """[B, 3, 4, 4] -> [B, 3, 4, 4], with a group norm."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.GroupNorm(2, 8)
            self.middle = nn.Conv2d(8, 8, 3, padding=1)
            self.conv_out = nn.Conv2d(8, 3, 3, padding=1)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.norm(self.conv_in(x)))
        return self.conv_out(nn.functional.silu(self.middle(hidden)))


@dataclass(frozen=True)
class Distance:
    """weight * |y - target|^2, summed over a row: a loss with two fields."""

    weight: float = 1.0
    target: float = 0.0

    def __call__(self, y: Tensor) -> Tensor:
        return self.weight * (y - self.target).square().flatten(1).sum(1)


def samples(rows: int, seed: int) -> tuple[Tensor, ...]:
    return (torch.randn(rows, 3, 4, 4, generator=torch.Generator().manual_seed(seed)),)


def digest(network: nn.Module) -> str:
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in network.state_dict().values())).hexdigest()


def function(
    name: str, call_of: Callable[[nn.Module], Callable[..., Any]], network: nn.Module, **fields: Any
) -> Function:
    made = Function(
        name=name,
        call=call_of(network),
        inputs=(IMAGE,),
        outputs=(replace(IMAGE, name="result"),),
        kind="forward",
        rows=6,
        largest=12,
        samples=samples,
        exact=lambda: call_of(copy.deepcopy(network).double()),
        components={"network": digest(network)},
        device=torch.device("cpu"),
        sources="of the test",
        networks=(network,),
    )
    return replace(made, **fields)


def decode(seed: int = 0, **fields: Any) -> Function:
    """The network itself."""

    def call_of(network: nn.Module) -> Callable[..., Any]:
        return lambda image: (network(image),)

    return function("decode", call_of, Network(seed), **fields)


def gradient(loss: Any = None, seed: int = 0, **fields: Any) -> Function:
    """(dL/dimage, L), by autograd."""
    loss = loss or Distance()

    def call_of(network: nn.Module) -> Callable[..., Any]:
        def run(image: Tensor) -> tuple[Tensor, ...]:
            leaf = image.detach().requires_grad_()
            with torch.enable_grad():
                losses = loss(network(leaf))
                (found,) = torch.autograd.grad(losses.sum(), leaf)
            return found, losses.detach()

        return run

    outputs = (replace(IMAGE, name="gradient"), TensorSpec("loss", (None,), "float32"))
    more = {"outputs": outputs, "kind": "gradient", "config": {"losses": [described(loss)]}, **fields}
    return function("gradient", call_of, Network(seed), **more)


class Unchanged:
    """A backend whose engine is the traced graph itself: nothing is compiled, and `compiled` names what was asked."""

    stored, versions_here = True, {"unchanged": "1"}

    def __init__(self, name: str = "unchanged", fixed_rows: bool = False, targets: Sequence[str] = ()) -> None:
        self.name, self.fixed_rows, self.targets = name, fixed_rows, tuple(targets)
        self.compiled: list[Any] = []

    def unusable(self, device: object, dtype: str = "float32") -> str | None:
        return "it is out of order" if dtype == "bfloat16" else None

    def versions(self) -> dict[str, str]:
        return dict(self.versions_here)

    def flags(self, device: object) -> dict[str, str]:
        return {}

    def compile(self, graph: Any, spec: Any, folder: Path) -> None:
        (folder / "engine").write_text(str(len(self.compiled)))
        self.compiled.append(graph)

    def load(self, folder: Path, spec: Any, device: object) -> Any:
        return self.compiled[int((folder / "engine").read_text())]


def milliseconds(engine: float, eager: float) -> dict[str, Any]:
    return {"engine": engine, "eager": eager, "rows": 6, "threads": 1, "kernels": "torch"}


def set_facts(store: EngineStore, key: str, **facts: Any) -> None:
    """Write other facts into an engine's manifest, as if they had been measured."""
    manifest = store.get(key)
    assert manifest is not None
    changed = replace(manifest, facts={**manifest.facts, **facts})
    (store.root / key / MANIFEST).write_text(changed.to_text())


def flip_a_byte(store: EngineStore, key: str) -> None:
    file = next(path for path in sorted((store.root / key / "payload").rglob("*")) if path.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
