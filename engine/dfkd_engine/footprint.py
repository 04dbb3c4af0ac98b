"""Bytes that a function holds at its peak, counted as its tensors come and go.

Live storages are counted, so what autograd saves for a backward pass counts as long as it is kept. The scratch memory
of a single kernel and an allocator's rounding do not: leave room for them. The count follows from the shapes alone, the
same at every start and whatever else runs; `without_data` it takes no memory and no arithmetic either. FLOP are counted
on the way.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfkd_engine.planner import Footprint
from dfkd_engine.work import flop_of

# Bytes grow in proportion to the rows but for constants of a few kilobytes, so two small calls tell.
_ROWS = (1, 2)


def footprint(call: Callable[[int], object], without_data: bool) -> Footprint:
    """Of `call(rows)`, which makes its inputs itself: they count.

    without_data: on tensors that have a shape and nothing else, which costs a millisecond an operation however large
        they are. A function that asks for values, or an operation that torch knows no shapes of, is run as it is.
    """
    if without_data:
        try:
            return _counted(call, FakeTensorMode(allow_non_fake_inputs=True))
        except Exception:  # many kinds, by what the function asks for; its own faults come again below
            pass
    return _counted(call, None)


def _counted(call: Callable[[int], object], fake: FakeTensorMode | None) -> Footprint:
    found = []
    for rows in _ROWS:
        with fake or nullcontext(), _Live() as live:
            call(rows)
        found.append(live)
    (low, high), (few, many) = _ROWS, found
    row = -(-(many.peak - few.peak) // (high - low))
    return Footprint(max(few.peak - low * row, 0), row, -(-many.largest // high), many.flop // high)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """bytes of live storages that operations made, their peak, elements of the largest tensor made, and all FLOP."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = self.largest = self.flop = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flop += flop_of(func, args, kwargs or {}, out)
        if not any(result.alias_info for result in func._schema.returns):  # views and writes in place make no storage
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self.largest = max(self.largest, tensor.numel())
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

        def freed(_: object) -> None:
            self.bytes -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)


def weight_bytes(*networks: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
