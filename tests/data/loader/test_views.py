import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd.errors import UsageError
from dfkd.data.loader.views import KINDS, Views, apply, colour, crop, draw, warp


def images(batch: int = 16, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def augment(before: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    return apply(before, draw(kind, len(before), *before.shape[-2:], generator))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (1, 1)])
def test_views_keep_shape_type_and_range_and_follow_the_generator(kind: str, size: tuple[int, int]) -> None:
    before = images(16, *size)
    kept = before.clone()
    views = augment(before, kind, seeded())
    assert views.shape == before.shape and views.dtype == before.dtype
    # Bilinear weights add up to 1 only within rounding.
    assert views.min() >= -1e-6 and views.max() <= 1 + 1e-6
    assert torch.equal(views, augment(before, kind, seeded()))
    assert torch.equal(before, kept)
    if kind != "none" and size != (1, 1):
        assert not torch.equal(views, augment(before, kind, seeded(1)))


def test_crop_is_the_window_of_the_padded_image() -> None:
    before, pad = images(3, 8, 6), (1, 2)
    top, left, flip = torch.tensor([0, 2, 1]), torch.tensor([4, 0, 2]), torch.tensor([False, True, False])
    after = crop(before, top, left, flip, pad)
    for i in range(3):
        canvas = torch.zeros(3, 10, 10)
        canvas[:, 1:9, 2:8] = before[i]
        window = canvas[:, int(top[i]) : int(top[i]) + 8, int(left[i]) : int(left[i]) + 6]
        assert torch.equal(after[i], window.flip(-1) if flip[i] else window)


def test_crop_flip_flips_about_half_and_shift_none() -> None:
    ramp = torch.linspace(0.1, 1, 32).expand(400, 3, 32, 32)

    def rising(views: Tensor) -> float:
        middle = views[:, 0, 16, 8:24]
        return float((middle[:, -1] > middle[:, 0]).float().mean())

    assert rising(augment(ramp, "shift", seeded())) == 1
    assert 0.4 < rising(augment(ramp, "crop-flip", seeded())) < 0.6
    assert rising(augment(ramp, "affine", seeded())) == 1
    assert 0.4 < rising(augment(ramp, "rrc-flip", seeded())) < 0.6


def test_warp_by_the_identity_and_by_whole_pixels_is_exact() -> None:
    before = images(2, 8, 8)
    identity = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]).expand(2, -1, -1)
    # The positions are rounded to about 1e-6 of a pixel.
    assert torch.allclose(warp(before, identity), before, atol=1e-5)
    right = torch.tensor([[[1.0, 0, 2 * 2 / 8], [0, 1, 0]]]).expand(2, -1, -1)
    moved = warp(before, right)
    assert torch.allclose(moved[..., :6], before[..., 2:], atol=1e-5)
    assert torch.allclose(moved[..., 6:], before[..., 6:].flip(-1), atol=1e-5)  # reflected at the border


def test_affine_moves_the_centre_by_three_pixels_at_most() -> None:
    dot = torch.zeros(500, 3, 33, 33)
    dot[:, :, 16, 16] = 1
    views = augment(dot, "affine", seeded())[:, 0]
    at = torch.arange(33.0) - 16
    mass = views.sum((1, 2))
    column, row = (views.sum(1) * at).sum(1) / mass, (views.sum(2) * at).sum(1) / mass
    # Rotation and scale act about the centre. The centroid of a dot resampled bilinearly is up to half a pixel off.
    assert 2.5 < max(column.abs().max(), row.abs().max()) <= 33 * 3 / 32 + 0.5
    assert min(column.std(), row.std()) > 1


def test_affine_keeps_circles_round_in_wide_images() -> None:
    y, x = torch.meshgrid(torch.arange(32.0) - 15.5, torch.arange(64.0) - 31.5, indexing="ij")
    disc = ((x**2 + y**2) < 64).float().expand(50, 3, 32, 64)
    views = augment(disc, "affine", seeded())[:, 0]
    wide, high = (views.amax(1) > 0.5).sum(1), (views.amax(2) > 0.5).sum(1)
    assert (wide - high).abs().max() <= 1


def test_colour_is_its_formula() -> None:
    before = images(2)
    contrast, brightness = torch.tensor([0.5, 1.5]).view(2, 1, 1, 1), torch.tensor([0.1, -0.1]).view(2, 1, 1, 1)
    gain = torch.tensor([[1.0, 0.9, 1.2], [0.8, 1.0, 1.1]]).view(2, 3, 1, 1)
    mean = before.mean((1, 2, 3), keepdim=True)
    wanted = (((before - mean) * contrast + mean + brightness) * gain).clamp(0, 1)
    assert torch.allclose(colour(before, contrast, brightness, gain), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_views_of_some_rows_are_those_of_the_whole(kind: str) -> None:
    before, views = images(), draw(kind, 16, 32, 32, seeded())
    whole = apply(before, views)
    assert torch.equal(apply(before[5:9], views.rows(slice(5, 9))), whole[5:9])
    assert (
        views.rows(slice(0, 16)) == Views()
        if kind == "none"
        else any(part is not None for part in vars(views).values())
    )


def test_unknown_kinds_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="crop-flop"):
        augment(images(), "crop-flop", seeded())


@pytest.mark.parametrize("size", [(32, 32), (8, 12), (7, 5)])
def test_positions_are_those_of_affine_grid(size: tuple[int, int]) -> None:
    """Only what every image shares is made once; products of odd sizes may be summed in another order."""
    g = torch.Generator().manual_seed(0)
    images, matrix = torch.rand(6, 3, *size, generator=g), torch.randn(6, 2, 3, generator=g)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    wanted = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    torch.testing.assert_close(warp(images, matrix), wanted, rtol=0, atol=1e-5)
