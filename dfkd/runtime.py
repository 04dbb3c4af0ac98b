"""What a process is and where it computes: device, rank, threads, and random numbers by what they are for."""

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dfkd.errors import UsageError


@dataclass(frozen=True)
class Rank:
    """Number `number` of `count` processes, `local` of the `neighbours` on this machine."""

    number: int = 0
    count: int = 1
    local: int = 0
    neighbours: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the first of the run's processes, which alone prints and writes what a run has one of."""
        return self.number == 0

    def owns(self, index: int) -> bool:
        """Whether part `index` of the work is this process's."""
        return index % self.count == self.number


def own_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """This process among those that torchrun started, told by the environment alone; without torchrun, alone."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return Rank()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Rank(*(int(environment[name]) for name in names))


def resolve_device(name: str, rank: Rank | None = None) -> torch.device:
    """The device by name, made the current one where it is a GPU; "auto" is a GPU where there is one.

    Of several processes on a machine each takes the GPU of its local rank.
    Raises UsageError: unknown, absent, or a GPU that several processes would share.
    """
    rank = rank or Rank()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is unknown", "known are auto, cpu, cuda and cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r} is not supported", "supported are auto, cpu, cuda and cuda:N")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise UsageError(f"--device {name} is absent", f"torch sees {count} GPUs", "use --device auto")
    if rank.neighbours > 1:
        if device.index is not None:
            why = "each takes the GPU of its own rank"
            raise UsageError(f"--device {name} with several processes", why, "use --device cuda")
        if rank.neighbours > count:
            raise UsageError(
                f"torchrun starts {rank.neighbours} processes here",
                f"torch sees {count} GPUs, and each process takes one",
                "lower --nproc-per-node, or use --device cpu",
            )
        device = torch.device("cuda", rank.local)
    if device.index is not None:
        torch.cuda.set_device(device)  # Triton launches on the current device, whatever its tensors' is
    return device


def cpu_threads(asked: int = 0, environment: Mapping[str, str] = os.environ) -> int:
    """Threads of a process on the CPU: as asked, else OMP_NUM_THREADS as torch read it.

    torchrun sets OMP_NUM_THREADS to 1 where the user has set nothing. Threads decide the last bits of a sum, so a
    process of torchrun takes all cores then, as one that runs alone does.
    """
    if asked:
        return asked
    if "TORCHELASTIC_RUN_ID" in environment and environment.get("OMP_NUM_THREADS") == "1":
        return _cores()
    return torch.get_num_threads()


def _cores() -> int:
    """Cores that this process may use; two threads of one core count once, as they do in torch's own default."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    return len(cores)


def derived_seed(seed: int, purpose: str, index: int) -> int:
    """63 bits that follow from the run's seed, a purpose ("order", "view", ...) and a counter (epoch or step).

    A hash, so that neighbouring seeds or steps share nothing; a resumed run needs no generator's state.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_global(seed: int, device: torch.device) -> None:
    """Seed the generators that layers such as dropout draw from on `device`."""
    # torch.manual_seed() also formats a stack trace for every kind of device: too slow for once a step.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator with the derived seed."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, index))


@dataclass(frozen=True)
class KernelChoice:
    """name: "torch" or "triton". why: for people."""

    name: str
    why: str


def choose_kernels(wanted: str, device: torch.device) -> KernelChoice:
    """What `auto`, `triton` or `torch` comes to on this device.

    Raises UsageError: triton where it is not installed, or on a CPU outside Triton's interpreter.
    """
    if wanted == "torch":
        return KernelChoice("torch", "as asked")
    installed = importlib.util.find_spec("triton") is not None
    if wanted == "auto":
        if device.type != "cuda":
            return KernelChoice("torch", f"the device is {device.type}")
        if installed:
            return KernelChoice("triton", f"the device is {device.type}")
        return KernelChoice("torch", "Triton is not installed (pip install 'dfkd[gpu]')")
    if not installed:
        why = "Triton is not installed"
        raise UsageError("--kernels triton", why, "pip install 'dfkd[gpu]', or use --kernels torch")
    if device.type == "cuda":
        return KernelChoice("triton", "as asked")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return KernelChoice("triton", "as asked, in its interpreter (TRITON_INTERPRET=1), which is slow")
    raise UsageError(
        f"--kernels triton on {device.type}",
        "Triton compiles for GPUs",
        "use --kernels torch, or set TRITON_INTERPRET=1 to try the kernels in its interpreter",
    )
