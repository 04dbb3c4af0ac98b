"""Latent CutMix: geometry, distribution, partners, and independence of the group's order."""

import math

import pytest
import torch

from dfkd.errors import UsageError
from dfkd.synthesis.cutmix import CutMixPlan, packed, plan
from dfkd_kernels.guided_step import paste

IDS = torch.tensor([5, 3, 17, 8, 100, 2**40, 9, 1])
LABELS = torch.tensor([0, 1, 0, 1, 0, 2, 1, 0])


def big(alpha, n=4000, height=64, width=64, event=0):
    return plan(1, torch.arange(n), torch.zeros(n, dtype=torch.int64), event, alpha, height, width)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_lam_is_beta(alpha):
    """Mean 1/2 and variance 1 / (4 (2a + 1)), within five standard errors."""
    lam = big(alpha).lam
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(lam.mean() - 0.5) < 5 * math.sqrt(variance / len(lam))
    assert abs(lam.var() / variance - 1) < 5 * math.sqrt(2 / len(lam))


@pytest.mark.parametrize("height, width", [(64, 64), (8, 8), (5, 9), (1, 1)])
def test_boxes_lie_inside_and_have_the_drawn_sides(height, width):
    made = big(1.0, height=height, width=width)
    y0, x0, y1, x1 = made.box.T
    for low, high, size in ((y0, y1, height), (x0, x1, width)):
        length = size * torch.sqrt(1 - made.lam)
        assert ((low >= 0) & (low <= high) & (high <= size)).all()
        assert (high - low <= length + 1).all()  # both ends are rounded, half a cell each
        unclipped = (low > 0) & (high < size)
        assert ((high - low)[unclipped] >= length[unclipped] - 1).all()


def test_centres_are_uniform():
    """Every row is covered as often as a uniform centre says, mirrored rows alike."""
    box = big(1.0, n=20000).box
    rows = torch.arange(64)[:, None]
    covered = ((rows >= box[:, 0]) & (rows < box[:, 2])).double().mean(1)
    assert torch.allclose(covered, covered.flip(0), atol=5 * math.sqrt(0.5 / 20000))


def test_partners_share_the_class_and_are_others():
    made = plan(7, IDS, LABELS, 0, 1.0, 8, 8)
    assert torch.equal(LABELS[made.partner], LABELS)
    own = made.partner == torch.arange(len(IDS))
    assert own.tolist() == (LABELS == 2).tolist()  # the only image of class 2 is its own partner


def test_partners_are_drawn_evenly():
    """400 classes of five: each place of a class pastes from each of the other four equally often."""
    ids = torch.arange(2000)
    partner = plan(3, ids, ids // 5, 0, 1.0, 8, 8).partner
    counts = torch.zeros(5, 5).index_put_((ids % 5, partner % 5), torch.tensor(1.0), accumulate=True)
    assert (counts.diag() == 0).all()
    others = counts[~torch.eye(5, dtype=torch.bool)]
    assert (abs(others - 100) < 5 * math.sqrt(400 * 0.25 * 0.75)).all()


def test_order_of_the_group_does_not_matter():
    made = plan(7, IDS, LABELS, 3, 1.0, 8, 8)
    order = torch.tensor([6, 2, 0, 7, 1, 5, 3, 4])
    moved = plan(7, IDS[order], LABELS[order], 3, 1.0, 8, 8)
    assert torch.equal(moved.box, made.box[order]) and torch.equal(moved.lam, made.lam[order])
    assert torch.equal(IDS[order][moved.partner], IDS[made.partner][order])


def test_events_and_seeds_differ():
    plans = [plan(seed, IDS, LABELS, event, 1.0, 64, 64).lam for seed in (0, 1) for event in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(plans) for b in plans[:i])


def test_the_paste_is_exactly_the_box():
    z = torch.randn(8, 4, 6, 7)
    before, made = z.clone(), plan(7, IDS, LABELS, 0, 1.0, 6, 7)
    mixed = paste(z, made.partner, made.box)
    for i, (y0, x0, y1, x1) in enumerate(made.box.tolist()):
        expected = z[i].clone()
        expected[:, y0:y1, x0:x1] = z[made.partner[i], :, y0:y1, x0:x1]
        assert torch.equal(mixed[i], expected)
    assert torch.equal(z, before) and (mixed != z).any()


def test_a_lone_image_and_an_empty_group_are_planned_too():
    assert plan(0, torch.tensor([4]), torch.tensor([0]), 0, 1.0, 4, 4).partner.tolist() == [0]
    assert plan(0, IDS[:0], LABELS[:0], 0, 1.0, 4, 4).box.shape == (0, 4)


def test_packed_groups_keep_their_own_partners():
    parts = [plan(7, IDS[cut], LABELS[cut], 0, 1.0, 8, 8) for cut in (slice(0, 5), slice(5, 8))]
    both = packed(parts)
    assert isinstance(both, CutMixPlan) and torch.equal(both.box, torch.cat([part.box for part in parts]))
    assert torch.equal(IDS[both.partner[:5]], IDS[:5][parts[0].partner])
    assert torch.equal(IDS[both.partner[5:]], IDS[5:][parts[1].partner])


def test_refusals():
    with pytest.raises(UsageError, match="CutMix alpha 0: the Beta distribution"):
        plan(0, IDS, LABELS, 0, 0, 8, 8)
    with pytest.raises(ValueError, match="ids unique"):
        plan(0, torch.tensor([1, 1]), torch.tensor([0, 0]), 0, 1.0, 8, 8)
