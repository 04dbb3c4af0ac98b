"""Mixtures of a batch: of neighbours, of the area asked, and the same however the batch is shared out."""

import pytest
import torch

from dfkd.config.training import MIXES
from dfkd.training.mixing import mix


def images(batch: int = 16) -> torch.Tensor:
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", MIXES)
def test_mixtures_are_of_an_image_and_its_neighbour(kind: str) -> None:
    before = images(64)
    after = mix(before, kind, 1.0, seeded(), len(before))
    other = before.roll(1, 0)
    pasted = ((after == before) | (after == other)).flatten(1).all(1)
    blended = ~pasted
    assert torch.all((after >= torch.minimum(before, other) - 1e-6) & (after <= torch.maximum(before, other) + 1e-6))
    if kind == "none":
        assert torch.equal(after, before)
    elif kind == "mixup":
        assert blended.all()
    elif kind == "cutmix":
        assert pasted.all() and not torch.equal(after, before)
    else:
        assert 10 < int(blended.sum()) < 54
    assert torch.equal(after, mix(before, kind, 1.0, seeded(), len(before)))


def test_cutmix_boxes_have_the_area_of_lam_on_average() -> None:
    white = torch.zeros(2000, 1, 32, 32)
    white[::2] = 1  # neighbours are black and white, so a pasted pixel shows
    after = mix(white, "cutmix", 1.0, seeded(), len(white))
    pasted = (after != white).float().mean((1, 2, 3))
    # Beta(1, 1) is uniform: a mean of 1/2 unclipped; clipping at the border takes (with a side uniform in area) some.
    assert 0.25 < float(pasted.mean()) < 0.5
    assert pasted.max() > 0.8 and pasted.min() < 0.05


@pytest.mark.parametrize("kind", MIXES)
def test_a_rank_draws_what_the_whole_batch_draws(kind: str) -> None:
    before = images()
    whole = mix(before, kind, 1.0, seeded(), len(before))
    for rows in (slice(0, 8), slice(8, 16)):
        part = mix(before[rows], kind, 1.0, seeded(), 16, rows)
        assert torch.equal(part[1:], whole[rows][1:])  # the first image's neighbour is another
