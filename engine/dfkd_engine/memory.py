"""Memory of a network's calls: measured by the row, and how many rows a call may therefore hold.

Bytes are counted as tensors come and go, so what autograd saves for a backward pass counts as long as it is kept. The
scratch memory of a single kernel and an allocator's rounding do not: leave room for them. The count follows from the
shapes alone, the same at every start and whatever else runs.
"""

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

# Elements of one tensor: convolutions, and the indices of most kernels, refuse more.
ELEMENT_LIMIT = 2**31 - 1

# Bytes grow in proportion to the rows but for constants of a few kilobytes, so two small calls tell.
_MEASURED_ROWS = (1, 2)


def _of_attentions_gradient(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> int:
    """Four matrix products, as the gradient is defined: fused kernels form the scores once more, others keep them."""
    heads, queries, width = query.shape[:-2].numel(), query.shape[-2], query.shape[-1]
    return int(sdpa_backward_flop(grad, query, key, value)) - 2 * heads * queries * key.shape[-2] * width


_FUSED = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
# torch's counter knows the fused attention of GPUs, not the CPU's.
_FLOP: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    **{getattr(torch.ops.aten, f"_scaled_dot_product_{name}_backward"): _of_attentions_gradient for name in _FUSED},
}


@dataclass(frozen=True)
class Footprint:
    """Needs of a call beside weights.

    fixed: bytes of any call. row: bytes of every row. elements: of one row's largest tensor. flop: of one row, those of
    convolutions, matrix products and attention, a multiplication and an addition being two.
    """

    fixed: int
    row: int
    elements: int
    flop: int = 0

    def bytes(self, rows: int) -> int:
        return self.fixed + rows * self.row

    def most_rows(self, memory: int) -> int:
        """The most rows that fit in `memory` bytes; may be 0."""
        return max(memory - self.fixed, 0) // max(self.row, 1)


def footprint(call: Callable[[int], object], without_data: bool) -> Footprint:
    """The needs of `call(rows)`, which makes its inputs itself: they count.

    without_data: on tensors that have a shape and nothing else, which costs a millisecond an operation however large
        they are. A function that asks for values, or an operation that torch knows no shapes of, is run as it is.
    """
    if without_data:
        try:
            return _counted(call, FakeTensorMode(allow_non_fake_inputs=True))
        except Exception:  # many kinds, by what the function asks for; its own faults come again below
            pass
    return _counted(call, None)


def weight_bytes(*networks: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def shared(total: int, most: int) -> int:
    """Rows of a call, `most` at most, where as few calls as that allows share `total` rows."""
    calls = -(-total // max(most, 1))
    return -(-total // calls)


def halved(rows: int) -> int:
    """The next number of rows to try where a call of `rows` > 1 ran out of memory."""
    return rows // 2


def most_rows(elements: int) -> int:
    """The most rows of `elements` each that one tensor holds; 0 where one row is too large."""
    return ELEMENT_LIMIT // elements


def _counted(call: Callable[[int], object], fake: FakeTensorMode | None) -> Footprint:
    found = []
    for rows in _MEASURED_ROWS:
        with fake or nullcontext(), _Live() as live:
            call(rows)
        found.append(live)
    (low, high), (few, many) = _MEASURED_ROWS, found
    row = -(-(many.peak - few.peak) // (high - low))
    return Footprint(max(few.peak - low * row, 0), row, -(-many.largest // high), many.flop // high)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """bytes of live storages that operations made, their peak, elements of the largest tensor made, and all FLOP."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = self.largest = self.flop = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := _FLOP.get(func._overloadpacket):
            self.flop += int(formula(*args, **kwargs, out_val=out))
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
