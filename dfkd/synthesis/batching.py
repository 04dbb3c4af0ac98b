"""Network calls: how images are cut into them, and how one that finds too little memory is told."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dfkd.errors import UsageError

# Errors of libraries that have no type of their own.
_WORDS = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


class ShortMemory(UsageError):
    """A call of `network` (unet, decode or gradient) found too little memory; `why` holds the device's words."""

    def __init__(self, network: str, why: str) -> None:
        super().__init__(f"out of memory in a call of {network}", why, "lower --batch, or --size")
        self.network = network


def cuts(total: int, batch: int) -> Iterator[slice]:
    """Slices of at most `batch` that together are range(total); the last may be smaller."""
    for start in range(0, total, batch):
        yield slice(start, min(start + batch, total))


@contextmanager
def calling(network: str) -> Iterator[None]:
    """Turn an out-of-memory error inside into ShortMemory, which names the network that was called.

    Contexts may be nested: the innermost gives the name, since it is nearest to the call that failed.
    """
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
