"""From which layer an operation comes, whether it runs in the forward or in the backward pass.

Layers are named by the networks that a function reaches through its closure, its object or its arguments, such as
"prior.vae.decoder.up_blocks.0.resnets.1.norm1".
"""

import functools
import sys
import types
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import traceback
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

_DEPTH = 8  # of a search through objects: a method of an object that holds a function that closes over another, ...


def networks_of(function: Callable[..., Any]) -> dict[str, nn.Module]:
    """Networks that the function reaches, by the path of names that leads to each, the shortest path first."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting: deque[tuple[str, Any]] = deque([("", function)])
    while waiting:
        path, value = waiting.popleft()
        if id(value) in seen or path.count(".") > _DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found[path or type(value).__name__] = value
            continue
        waiting.extend((f"{path}.{name}".strip("."), part) for name, part in _parts(value))
    return found


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value holds: (name, part)."""
    if isinstance(value, functools.partial):
        yield "", value.func
        yield "", value.args
        yield "", value.keywords
    elif isinstance(value, types.MethodType):
        yield "", value.__self__
        yield "", value.__func__
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        held = {name: value.__globals__.get(name) for name in value.__code__.co_names}
        # not on through other functions: that would reach much that the function only mentions
        yield from ((name, part) for name, part in held.items() if not callable(part) or isinstance(part, nn.Module))
    elif isinstance(value, Mapping):
        yield from ((str(name), part) for name, part in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(index), part) for index, part in enumerate(value))
    elif not isinstance(value, (type, types.ModuleType, torch.Tensor)) and hasattr(value, "__dict__"):
        yield from vars(value).items()


class ModulePaths(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, every node that tracing makes carries the path of its layer in node.meta["custom"]["module"].

    A backward operation belongs to the layer whose forward pass made its autograd node: their sequence numbers grow in
    the order of the forward pass. failed: the layer of the operation that raised, "" if none did.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names: dict[nn.Module, str] = {}
        for root, network in networks.items():
            for name, module in network.named_modules():
                self._names.setdefault(module, f"{root}.{name}".rstrip("."))
        self.failed = ""
        self._stack: list[str] = []
        self._starts, self._paths = [0], [""]

    @property
    def current(self) -> str:
        """The layer at work now; "" outside of all layers."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self._stack[-1] if self._stack else ""
        return self._paths[max(bisect_right(self._starts, node._sequence_nr()) - 1, 0)]

    @contextmanager
    def watching(self) -> Iterator["ModulePaths"]:
        handles = (
            register_module_forward_pre_hook(lambda module, _: self._enter(module)),
            register_module_forward_hook(lambda *_: self._leave(), always_call=True),
        )
        try:
            with traceback.preserve_node_meta(), self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        path = self.current
        try:
            with traceback.annotate({"module": path}):
                return func(*args, **(kwargs or {}))
        except Exception:
            self.failed = path
            raise

    def _enter(self, module: nn.Module) -> None:
        above = self._stack[-1] if self._stack else ""
        self._stack.append(self._names.get(module) or f"{above} ({type(module).__name__})".strip())
        self._mark()

    def _leave(self) -> None:
        left = self._stack.pop()
        if sys.exc_info()[0] is not None:  # the hook is called for a layer that raises, too
            self.failed = self.failed or left
        self._mark()

    def _mark(self) -> None:
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._paths.append(self._stack[-1] if self._stack else "")
