"""The processes of a run under torchrun: who is who, and what they tell one another.

A process that torchrun did not start is alone, and then nothing here communicates.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from dfkd.runtime import device_of, resolve_device
from dfkd.errors import UsageError
from dfkd.runtime import Rank, own_rank

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Rank ``rank`` of ``size``, on its device.

    words: a group that talks through main memory, beside the one that carries gradients; None where alone.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    words: Any = None

    @property
    def first(self) -> bool:
        """Of all ranks the one that writes files, logs and checks."""
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
        dist.broadcast_object_list(said, src=0, group=self.words)
        if said[1] is not None:
            raise said[1]
        return said[0]  # type: ignore[no-any-return]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the ranks of a tensor on the device, changed in place; NaN on one rank is NaN on all."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def shared(self, student: nn.Module) -> nn.Module:
        """The student as it is to be called in training: its gradient becomes the mean over the ranks, and running
        statistics are those of the first one."""
        if self.size == 1:
            return student
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(student, device_ids=devices)


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
        asked, self._asked = self._asked, (dist.all_reduce(told, dist.ReduceOp.MAX, self._world.words, True), told)
        if asked is None:
            return 0
        asked[0].wait()
        return int(asked[1])


@contextmanager
def join(device: str) -> Iterator[World]:
    """This process among those that torchrun started, for the time of the block.

    device: by name, as dfkd.device takes it; auto and cuda are the GPU of this process's local rank.
    Raises UsageError for a device that all ranks of a machine would share, or that is not there.
    """
    rank = own_rank() if dist.is_available() else Rank()
    if rank.count == 1:
        yield World(resolve_device(device))
        return
    place = device_of(device, rank.local, rank.neighbours)
    on_gpu = place.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(place)
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
    """Where processes find one another, apart from what those of before a restart have left there.

    On one machine torchrun's store outlives a restart, and a new process may read the address of a dead one. None where
    torch's own way is left: on several machines, whose counts of restarts may differ.
    """
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1"
    if not own:
        return None
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return PrefixStore(f"dfkd/life-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
