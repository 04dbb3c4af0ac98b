"""Micro-batches of one shape, and how many images a call may hold."""

import pytest
import torch

from dfkd.synthesis.memory import device_bytes, images_per_call
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


def test_a_published_image_fits_as_often_as_its_memory_says():
    gib = 2**30
    assert images_per_call(512 * 512, 128, 2, 0) == 31  # 2^31 elements of 256 channels at 512 x 512
    assert images_per_call(512 * 512, 128, 2, 10 * gib) == 2  # 0.6 x 10 GiB at 2.85 GiB an image
    assert images_per_call(512 * 512, 128, 4, 10 * gib) == 1
    assert images_per_call(512 * 512, 128, 4, 1) == 1  # one at least; the device has the last word
    assert images_per_call(32 * 32, 32, 4, 10 * gib) > 1000


def test_memory_of_the_device_does_not_change():
    cpu = torch.device("cpu")
    assert device_bytes(cpu) == device_bytes(cpu) >= 0
