"""Arithmetic and traffic of a function, operation by operation, counted on tensors without data.

FLOP are those of convolutions, matrix products and attention by their definitions, a multiplication and an addition
being two. Bytes are what an operation reads and writes when it runs alone, as it does eagerly: a view moves none.

    seconds >= sum over operations of max(FLOP / peak, bytes / bandwidth)      roofline (Williams et al., CACM 2009)

A compiler fuses what is no convolution, product or attention with its neighbours; `fused` counts those three alone, and
no compiler gets below it.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

# The counter of torch knows the fused attention of GPUs, not the CPU's.
_ATTENTION_ON_A_CPU: Mapping[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
_FLOP: Mapping[Any, Callable[..., int]] = {**flop_registry, **_ATTENTION_ON_A_CPU}


class Operation(NamedTuple):
    """dtype: of its result, such as "float32"; a peak is one of a precision."""

    flop: int
    bytes: int
    dtype: str


@dataclass(frozen=True)
class Work:
    """operations: how many there are of each; times: that all of them are done."""

    operations: Mapping[Operation, int]
    times: float = 1.0

    @property
    def flop(self) -> float:
        return self.times * sum(operation.flop * count for operation, count in self.operations.items())

    @property
    def bytes(self) -> float:
        return self.times * sum(operation.bytes * count for operation, count in self.operations.items())

    def launches(self, fused: bool = False) -> float:
        """Operations that run, each a kernel or more."""
        counts = (count for operation, count in self.operations.items() if operation.flop or not fused)
        return self.times * sum(counts)

    def seconds(self, peaks: Mapping[str, float], bandwidth: float, fused: bool = False) -> float:
        """The roofline's, at `peaks` FLOP/s by dtype and `bandwidth` bytes/s. Raises KeyError: a peak is missing."""

        def of(operation: Operation) -> float:
            traffic = operation.bytes / bandwidth
            return max(operation.flop / peaks[operation.dtype], traffic) if operation.flop else traffic * (not fused)

        return self.times * sum(count * of(operation) for operation, count in self.operations.items())

    def scaled(self, times: float) -> "Work":
        """So many times this work."""
        return Work(self.operations, self.times * times)


def work(call: Callable[[int], object], rows: int) -> Work:
    """Of `call(rows)`, which makes its inputs itself.

    It runs on tensors that have a shape and nothing else, a millisecond an operation however large they are; a function
    that asks for values is run as it is, with one row, and its work taken in proportion.
    """
    try:
        return Work(_counted(call, rows, FakeTensorMode(allow_non_fake_inputs=True)))
    except Exception:  # many kinds, by what the function asks for; its own faults come again below
        return Work(_counted(call, 1, None), rows)


def flop_of(func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> int:
    """Of one operation that torch dispatched, and what it gave."""
    formula = _FLOP.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def _counted(call: Callable[[int], object], rows: int, fake: FakeTensorMode | None) -> Counter[Operation]:
    seen = _Operations()
    with fake or nullcontext(), seen:
        call(rows)
    return seen.found


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[Operation] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns):
            return out  # a view
        flop = flop_of(func, args, kwargs, out)
        moved = sum(_bytes(leaf) for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
        made = next((leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)), None)
        if made is not None:
            self.found[Operation(flop, moved, str(made.dtype).removeprefix("torch."))] += 1
        return out


def _bytes(tensor: Tensor) -> int:
    """What is read of it or written to it: an expanded tensor's storage is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
