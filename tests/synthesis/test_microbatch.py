"""Micro-batches of one shape, the memory that they may take, and how it is told that it was short."""

import pytest
import torch

from dfkd.synthesis.memory import ShortMemory, calling, device_bytes, usable_bytes
from dfkd.synthesis.microbatch import cuts, in_microbatches


@pytest.mark.parametrize("total, micro", [(1, 1), (7, 3), (7, 7), (7, 64), (8, 4), (9, 4)])
def test_cuts_have_one_shape_and_cover_every_row_once(total, micro):
    made = list(cuts(total, micro))
    assert {len(rows) for rows, _ in made} == {min(total, micro)}
    counted = torch.cat([rows[:count] for rows, count in made])
    assert torch.equal(counted, torch.arange(total))
    assert all((rows[count:] == total - 1).all() for rows, count in made)


def test_in_microbatches_drops_the_filling():
    rows_seen = []
    out = in_microbatches(lambda rows: (rows_seen.append(len(rows)), rows * 10)[1], 5, 2)
    assert out.tolist() == [0, 10, 20, 30, 40] and rows_seen == [2, 2, 2]


def test_memory_of_the_device_does_not_change():
    cpu = torch.device("cpu")
    assert device_bytes(cpu) == device_bytes(cpu) >= 0
    assert 0 < usable_bytes(1000, cpu) < usable_bytes(1000, torch.device("cuda")) < 1000


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: tried 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_short_memory_is_told_from_other_errors(error):
    with pytest.raises(ShortMemory) as caught, calling("gradient"), calling("unet"):
        raise error
    assert caught.value.network == "unet" and caught.value.why == str(error).splitlines()[0]
    with pytest.raises(RuntimeError, match="another"), calling("unet"):
        raise RuntimeError("another")
