"""Memory that PyTorch frees on a CPU, kept by the process for what it allocates next.

A feature map of a batch takes megabytes. glibc gives a block of that size back to the system as soon as it is freed,
and for the next map the system hands out pages one by one, each filled with zeros: a third of the seconds of a guidance
gradient. PyTorch has a cache of its own on GPUs alone.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt, by glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed, for as long as the process lives, which stays as large as it was at most.

    Returns whether it does: glibc, the C library of most Linux systems, does.
    """
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return False
    never, all_of_it = (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)  # no blocks of the system's own; the heap never shrinks
    return all(library.mallopt(*given) == 1 for given in (never, all_of_it))
