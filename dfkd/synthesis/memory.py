"""The memory of a device that a synthesis may count on, and how to tell that it was short."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# The rest is for the scratch memory of kernels, fragmentation and the driver; on a CPU for everything else that runs.
_SHARES = {"cuda": 0.85, "cpu": 0.6}
# Errors of libraries that have no type of their own.
_WORDS = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


class ShortMemory(Exception):
    """A call of `network` (unet, decode or gradient) found too little memory."""

    def __init__(self, network: str, why: str) -> None:
        super().__init__(network, why)
        self.network, self.why = network, why


@contextmanager
def calling(network: str) -> Iterator[None]:
    """Raises ShortMemory where memory is short inside; within one another, the innermost gives the name."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ShortMemory(network, _first_line(error)) from None
    except RuntimeError as error:
        if any(words in str(error) for words in _WORDS):
            raise ShortMemory(network, _first_line(error)) from None
        raise


def release(device: torch.device) -> None:
    """Give back what a failed call left; to be called once its exception, which holds its tensors, is gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_bytes(device: torch.device) -> int:
    """Memory of a CUDA device, or of the machine for the CPU (0 where the system does not tell).

    All of it and not what is free: a run that was stopped and started again must cut its groups as before, or its
    images would differ in the last bits.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def usable_bytes(memory: int, device: torch.device) -> int:
    """Of `memory` bytes, those that weights and calls may take."""
    return int(_SHARES[device.type] * memory)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
