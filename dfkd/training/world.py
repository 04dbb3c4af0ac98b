"""The processes of a training under torchrun, and the signals that they take.

A process that torchrun did not start is alone, and then nothing here communicates.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from dfkd.errors import UsageError
from dfkd.runtime import Rank, own_rank, resolve_device

T = TypeVar("T")
DEFERRED = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`, on its device.

    cpu_group: a process group that talks through main memory, beside the one that carries gradients; None where alone.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    cpu_group: Any = None

    @property
    def first(self) -> bool:
        """Whether this process writes files, logs and checks."""
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What make() returns on the first rank, on every rank; a UsageError that it raises is raised on every rank.

        It is pickled on the way: tensors are to be in main memory.
        """
        if self.size == 1:
            return make()
        said: list[Any] = [None, None]
        if self.first:
            try:
                said[0] = make()
            except UsageError as error:
                said[1] = error
        dist.broadcast_object_list(said, src=0, group=self.cpu_group)
        if said[1] is not None:
            raise said[1]
        return said[0]  # type: ignore[no-any-return]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the ranks of a tensor on the device, changed in place; NaN on one rank is NaN on all."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def shared(self, network: nn.Module, unused: bool = False) -> nn.Module:
        """The network as it is to be called in training: its gradient becomes the mean over the ranks, and running
        statistics are those of the first one. unused: some of its parameters get no gradient, which DDP has to look for
        at every step."""
        if self.size == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices, find_unused_parameters=unused)

    def synchronised(self, network: nn.Module, wanted: str) -> nn.Module:
        """The network, whose BatchNorm layers, replaced in place, take statistics over all processes where that acts:
        `wanted` is "on", or "auto" on GPUs. Its weights keep their names."""
        if self.size == 1 or wanted == "off" or (wanted == "auto" and self.device.type != "cuda"):
            return network
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return converted


class Agreement:
    """The largest number that any rank names, on all of them after the same step: at once where there is one rank,
    and otherwise one step late, so that no rank waits for what the others are doing now."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._asked: tuple[Any, Tensor] | None = None

    def __call__(self, number: int) -> int:
        if self._world.size == 1:
            return number
        told = torch.tensor([number])
        asked, self._asked = self._asked, (dist.all_reduce(told, dist.ReduceOp.MAX, self._world.cpu_group, True), told)
        if asked is None:
            return 0
        asked[0].wait()
        return int(asked[1])


@contextmanager
def join(device: str) -> Iterator[World]:
    """This process among those that torchrun started, for the time of the block.

    device: by name, as dfkd.runtime.resolve_device takes it; auto and cuda are the GPU of this process's local rank.
    Raises UsageError for a device that all ranks of a machine would share, or that is not there.
    """
    rank = own_rank() if dist.is_available() else Rank()
    place = resolve_device(device, rank)
    if rank.count == 1:
        yield World(place)
        return
    on_gpu = place.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=(store := _store_of_this_life()),
        rank=rank.number if store else -1,
        world_size=rank.count if store else -1,
        device_id=place if on_gpu else None,
    )
    yield World(place, dist.get_rank(), rank.count, dist.new_group(backend="gloo"))
    dist.destroy_process_group()  # not after an error: it would wait for ranks that may be gone


def _store_of_this_life() -> Any:
    """The store in which processes find one another, with a prefix of this restart's own; None for torch's own way.

    On one machine torchrun's store outlives a restart, and without the prefix a new process may read the address of a
    dead one. On several machines it is left to torch: their counts of restarts may differ.
    """
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1"
    if not own:
        return None
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return PrefixStore(f"dfkd/life-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


@contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """SIGTERM and SIGINT only take a note until the end of the block; yields what tells the first one's number, or 0.

    A second SIGINT interrupts as ever (KeyboardInterrupt): who asks twice does not want to wait for a step. Outside the
    main thread, where Python runs no handlers, nothing changes.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {number: signal.signal(number, note) for number in DEFERRED}
    try:
        yield lambda: noted[0] if noted else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
