"""An engine as a function: arguments are checked by name, and results are the caller's own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dfkd_engine.backends import Backend, Run, get
from dfkd_engine.devices import architecture
from dfkd_engine.errors import EngineError
from dfkd_engine.spec import EngineSpec, TensorSpec, differing

if TYPE_CHECKING:
    from dfkd_engine.store import EngineStore

# Vector loads of compiled code may take it for granted; a slice of a tensor need not have it.
_ALIGNMENT = 16


class Engine:
    """Calls a backend's function with what it needs, and nothing else reaches it.

    spec: names, shapes and dtypes of arguments and results, and the batches that are allowed.
    run: from `Backend.load`, or any function of the spec's inputs on `device`. It sees contiguous tensors and a batch
        of at least 2.
    device: where arguments have to be; without an index, any device of the kind.

    An engine has no backward pass: an argument that requires a gradient is refused where gradients are recorded.
    Raises EngineError for a spec whose batch may be 1 though a result has no batch to cut.
    """

    def __init__(self, spec: EngineSpec, run: Run, device: torch.device | str = "cpu") -> None:
        self.spec, self.device, self._run = spec, torch.device(device), run
        whole = [result.name for result in spec.outputs if not result.batched]
        if whole and spec.rows[0] < 2:
            why = f"one row is computed as two equal ones, and {', '.join(whole)} has no batch to cut"
            raise EngineError(f"{spec.network} cannot allow a batch of 1", why, "let its smallest batch be 2")

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The results in the spec's order: new tensors, in any memory format. Arguments may have any strides.

        Raises:
            TypeError: a wrong number of arguments, a wrong dtype, or one that requires a gradient.
            ValueError: a wrong shape, number of rows or device.
        """
        rows = self._check(tensors)
        with torch.no_grad():
            arguments = tensors
            if rows == 1:  # compiled code takes a batch for at least 2: 1 broadcasts, and is compiled apart
                pairs = zip(tensors, self.spec.inputs, strict=True)
                arguments = tuple(x.expand(2, *x.shape[1:]) if wanted.batched else x for x, wanted in pairs)
            results = self._run(*map(_plain, arguments))
            if len(results) != len(self.spec.outputs):
                why = f"it returned {len(results)} results and its spec has {len(self.spec.outputs)}"
                raise EngineError(f"{self.spec.network} cannot be used", why, "build it again with dfkd-engines build")
            return _own([result[:1] for result in results] if rows == 1 else results, tensors)

    def _check(self, tensors: tuple[Tensor, ...]) -> int:
        """The batch of the arguments, once every one of them is found right."""
        spec = self.spec
        if len(tensors) != len(spec.inputs):
            names = ", ".join(str(wanted) for wanted in spec.inputs)
            raise TypeError(f"{spec.network} got {len(tensors)} arguments; it wants {len(spec.inputs)}: {names}")
        batch, first = 0, ""
        for tensor, wanted in zip(tensors, spec.inputs, strict=True):
            self._check_tensor(tensor, wanted)
            if tensor.requires_grad and torch.is_grad_enabled():
                raise TypeError(
                    f"{spec.network}: {wanted.name} requires a gradient, and an engine has no backward pass; "
                    f"detach it, or call under torch.no_grad()"
                )
            if wanted.batched and not first:
                batch, first = len(tensor), wanted.name
            elif wanted.batched and len(tensor) != batch:
                raise ValueError(
                    f"{spec.network}: {wanted.name} has {len(tensor)} rows and {first} has {batch}; wanted are as many"
                )
        smallest, _, largest = spec.rows
        if first and not smallest <= batch <= largest:
            raise ValueError(
                f"{spec.network}: {first} has {batch} rows; this engine takes {smallest} to {largest} at a time"
            )
        return batch

    def _check_tensor(self, tensor: Tensor, wanted: TensorSpec) -> None:
        name, network = wanted.name, self.spec.network
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{network}: {name} is of type {type(tensor).__name__}; wanted is a tensor, {wanted}")
        if tensor.dtype != getattr(torch, wanted.dtype):
            raise TypeError(f"{network}: {name} is {_dtype(tensor)}; wanted is {wanted.dtype}")
        if not _fits(tensor.shape, wanted.shape):
            raise ValueError(f"{network}: {name} has shape {list(tensor.shape)}; wanted is {wanted.shape_text()}")
        index = self.device.index
        if tensor.device.type != self.device.type or (index is not None and tensor.device.index != index):
            raise ValueError(f"{network}: {name} is on {tensor.device}; wanted is {self.device}")


def load(store: "EngineStore", key: str, device: torch.device | str, backend: Backend | None = None) -> Engine:
    """The engine of this key out of the store, on `device`.

    backend: of the caller's own; None: the one of the name that the engine's spec has.

    Every file is verified before any is loaded. Raises EngineError: there is none, it is damaged, it was built for
    another device or by other versions, or its backend cannot run here.
    """
    manifest = store.get(key)
    if manifest is None:
        raise EngineError(f"the engine {key} is missing", f"{store.root} does not hold it", _BUILD)
    spec = manifest.spec
    backend = get(spec.backend) if backend is None else backend
    what = f"the engine {manifest} cannot run here"
    if spec.device != (here := architecture(device)):
        raise EngineError(what, f"it was built for {spec.device}, this is {here}", _BUILD)
    if (why := backend.unusable(device, spec.dtype)) is not None:
        raise EngineError(what, why, "or choose another backend")
    own = backend.versions()
    if changed := differing({name: old for name, old in spec.versions.items() if name in own}, own):
        why = "; ".join(f"it was built with {name} {old}, here is {new}" for name, old, new in changed)
        raise EngineError(what, why, _BUILD)
    return Engine(spec, backend.load(store.payload(manifest), spec, device), device)


_BUILD = "build it with dfkd-engines build"


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(size in (None, found) for found, size in zip(shape, wanted, strict=True))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _plain(tensor: Tensor) -> Tensor:
    """A tensor as compiled code assumes it: contiguous and aligned, whatever strides it came with."""
    plain = tensor.detach().contiguous()
    return plain.clone() if plain.data_ptr() % _ALIGNMENT else plain


def _own(results: Sequence[Tensor], arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Results that share memory with no argument, not with one another, and with nothing larger."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in arguments}
    own = []
    for result in results:
        storage = result.untyped_storage()
        part = storage.nbytes() != result.numel() * result.element_size()
        own.append(result.clone() if part or storage.data_ptr() in taken else result)
        taken.add(storage.data_ptr())
    return tuple(own)
