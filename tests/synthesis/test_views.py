"""Views: moved and recoloured images against torch's own interpolation, how they are drawn, and where they act."""

import pytest
import torch
import torch.nn.functional as F

from dfkd.config import ViewConfig
from dfkd.errors import UsageError
from dfkd.synthesis.views import COLOURS, FIRST_STREAM, PLACES, draw, most_shift, seen, width
from tests.synthesis.small_networks import classifier, pipeline

F64 = torch.float64
SIDE, SEED = 9, 3
IDS = torch.arange(200)


def images(count=200, side=SIDE, dtype=torch.float32):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_shifts_and_flips_are_exact():
    """Pixel for pixel what padding by reflection, cutting out and mirroring give."""
    own, x = ViewConfig(shift=3, flip=True), images()
    view = draw(own, SEED, IDS, 0, SIDE, SIDE)
    got = seen(x, view)
    found = set()
    for i in IDS.tolist():
        scale, down, across_scale, across = view[i].tolist()
        flip = across_scale < 0
        across = int(across - (SIDE - 1 if flip else 0))
        assert (scale, abs(across_scale)) == (1, 1) and down == int(down)
        padded = F.pad(x[i : i + 1], (3, 3, 3, 3), mode="reflect")[0]
        want = padded[:, 3 + int(down) :, 3 + across :][:, :SIDE, :SIDE]
        assert torch.equal(got[i], want.flip(2) if flip else want)
        found |= {("down", int(down)), ("across", across), flip}
    assert found == {(axis, d) for axis in ("down", "across") for d in range(-3, 4)} | {True, False}


@pytest.mark.parametrize("own", [ViewConfig(crop=0.5), ViewConfig(crop=0.3, shift=4, flip=True)])
def test_crops_are_bilinear_interpolation(own):
    """Images and gradient as torch's grid_sample, whose reflection about pixels' centres is the same."""
    view, x = draw(own, SEED, IDS, 2, SIDE, SIDE).double(), images(dtype=F64).requires_grad_()
    i = torch.arange(SIDE, dtype=F64)
    y, xs = (2 * (view[:, k, None] * i + view[:, k + 1, None]) / (SIDE - 1) - 1 for k in (0, 2))
    grid = torch.stack([xs[:, None, :].expand(-1, SIDE, -1), y[:, :, None].expand(-1, -1, SIDE)], 3)
    want = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=True)
    torch.testing.assert_close(seen(x, view), want, rtol=1e-9, atol=1e-9)
    (got,), (expected,) = (torch.autograd.grad(y.square().sum(), x) for y in (seen(x, view), want))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    share = view[:, 0]
    assert own.crop <= share.min() < own.crop + 0.05 and 0.95 < share.max() <= 1


def test_a_crop_without_a_shift_stays_inside():
    scale, down, across_scale, across = draw(ViewConfig(crop=0.4), SEED, IDS, 0, SIDE, SIDE).T
    for size, start in ((scale, down), (across_scale, across)):
        assert (start >= 0).all() and (start + size * (SIDE - 1) <= SIDE - 1 + 1e-5).all()  # float32


def test_colours_by_hand():
    own, x = ViewConfig(colour=0.4), images(dtype=F64)
    view = draw(own, SEED, IDS, 0, SIDE, SIDE).double()
    grey = (torch.tensor([0.299, 0.587, 0.114], dtype=F64)[:, None, None] * x).sum(1, keepdim=True)
    matrix, offset = view[:, PLACES:].reshape(-1, 3, 4).split([3, 1], 2)
    # b = (1 - contrast) / 2; a row of M sums to brightness times contrast; what is on its diagonal tells saturation
    contrast = 1 - 2 * offset[:, 0, 0]
    brightness = matrix.sum(2)[:, 0] / contrast
    saturation = 1 - matrix[:, 0, 1] / 0.587 / brightness / contrast
    for factor in (brightness, contrast, saturation):
        assert 0.6 - 1e-5 <= factor.min() < 0.65 and 1.35 < factor.max() <= 1.4 + 1e-5  # float32
    of = [factor[:, None, None, None] for factor in (brightness, contrast, saturation)]
    want = grey + of[2] * (x - grey)
    want = 0.5 + of[1] * (of[0] * want - 0.5)
    torch.testing.assert_close(seen(x, view), want, rtol=1e-6, atol=1e-6)  # factors were float32


def test_a_view_follows_from_seed_id_and_number_alone():
    own = ViewConfig(shift=2, crop=0.7, colour=0.1)
    view = draw(own, SEED, IDS, 4, SIDE, SIDE)
    assert view.shape == (200, width(own)) == (200, PLACES + COLOURS) and view.dtype == torch.float32
    assert torch.equal(draw(own, SEED, IDS[7:9], 4, SIDE, SIDE), view[7:9])
    assert not torch.equal(draw(own, SEED, IDS, 5, SIDE, SIDE), view)
    assert not torch.equal(draw(own, SEED + 1, IDS, 4, SIDE, SIDE), view)
    assert seen(images(), None) is not None and FIRST_STREAM == 2**31


def test_a_shift_is_in_pixels_of_the_teacher():
    assert most_shift(ViewConfig(shift=2), 64, 8) == 16 and most_shift(ViewConfig(shift=4), 8, 16) == 2
    assert most_shift(ViewConfig(), 8, 8) == 0
    with pytest.raises(UsageError, match=r"--guide-shift 1 moves images of 8 pixels by 0: .*16.*use 2 to 14, or 0"):
        most_shift(ViewConfig(shift=1), 8, 16)
    with pytest.raises(UsageError, match=r"--guide-shift 8 moves images of 8 pixels by 8: .*use 1 to 7, or 0"):
        pipeline(guide_shift=8)


def made(**settings):
    return pipeline(**{"guide_from": 0.4, **settings})(range(7), seed=SEED).images.int()


VIEWS = {"guide_shift": 2, "guide_flip": True, "guide_crop": 0.6, "guide_colour": 0.3}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("where", [{}, {"gradient": "unet"}, {"guide_from": 1.0, "refine_steps": 2},
                                   {"guide_from": 1.0, "noise_edit_steps": 1, "noise_edit_scale": 9.0}])  # fmt: skip
def test_every_view_acts_wherever_a_gradient_is_taken(name, where):
    assert not torch.equal(made(**where, **{name: VIEWS[name]}), made(**where))


@pytest.mark.parametrize("own", [{}, {"gradient": "unet"}, {"refine_steps": 2, "noise_edit_steps": 1}])
def test_an_images_views_do_not_follow_from_its_batch(own):
    """Nor does the pass for the statistics of a group in several calls see others than the gradient does."""
    whole = made(**VIEWS, **own)
    assert (made(**VIEWS, **own, batch=3) - whole).abs().max() <= 1  # float32, summed in another order
    alone = pipeline(**VIEWS, **own, bn_stats="image", guide_from=0.4)
    together, one = alone(range(7), seed=SEED).images.int(), alone([5], seed=SEED).images.int()
    assert (together[5] - one[0]).abs().max() <= 1


def test_each_gradient_has_its_own_view():
    pipe, seen_at = pipeline(guide_shift=2, guidance_repeats=2, refine_steps=1, noise_edit_steps=1), []
    drawn = pipe.view

    def view(seed, ids, number):
        seen_at.append(number)
        return drawn(seed, ids, number)

    pipe.view = view
    pipe(range(7), seed=SEED)
    assert seen_at == list(range(1 + 2 * 4 + 1))


def test_a_shift_is_taken_before_the_teachers_resize():
    """So that a teacher of a quarter of the pixels sees four phases of its resize."""
    pipe = pipeline(teacher=classifier().replace(input_size=4), guide_shift=1)
    view = pipe.view(SEED, IDS, 0)
    assert set(view[:, 1].tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
