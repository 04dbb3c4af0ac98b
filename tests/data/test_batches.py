"""Order of images, and their views."""

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dfkd.data import KINDS, Order, apply_views, draw, steps
from dfkd.data.views import colour, crop, warp
from dfkd.errors import UsageError


def images(batch: int = 16, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=seeded(1))


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def augment(before: Tensor, kind: str, generator: Generator) -> Tensor:
    return apply_views(before, draw(kind, len(before), *before.shape[-2:], generator))


def stream(order: Order) -> Tensor:
    return torch.cat([order.batch(step) for step in range(order.steps)])


@pytest.mark.parametrize("batch_size", [1, 3, 8, 11, 100])
def test_every_epoch_shows_each_image_once_in_another_order(batch_size: int) -> None:
    epochs = stream(Order(seed=0, count=8, batch_size=batch_size, length=5 * 8)).view(5, 8)
    assert all(sorted(epoch.tolist()) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 5


def test_batches_have_one_size_across_the_ends_of_epochs() -> None:
    order = Order(seed=0, count=10, batch_size=4, length=30)
    assert [len(order.batch(step)) for step in range(order.steps)] == [4] * 7 + [2]
    assert [order.size(step) for step in range(order.steps)] == [4] * 7 + [2]


def test_the_order_follows_the_seed_and_not_the_batch_size() -> None:
    assert torch.equal(stream(Order(1, 50, 7, 100)), stream(Order(1, 50, 20, 100)))
    assert not torch.equal(stream(Order(1, 50, 7, 100)), stream(Order(2, 50, 7, 100)))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_partition_every_batch_in_order(world: int) -> None:
    whole = Order(seed=1, count=10, batch_size=6, length=32)
    ranks = [Order(1, 10, 6, 32, rank, world) for rank in range(world)]
    for step in range(whole.steps):
        parts = [order.batch(step) for order in ranks]
        assert torch.equal(torch.cat(parts), whole.batch(step))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_images_view_depends_on_its_step_and_not_on_the_number_of_ranks(kind: str) -> None:
    before = images(10, 8, 8)

    def views(rank: int, world: int, start: int = 0) -> list[Tensor]:
        found = steps(Order(1, 10, 6, 32, rank, world), kind, 8, start)
        return [apply_views(before[step.positions], step.views) for step in found]

    whole = views(0, 1)
    for one, *parts in zip(whole, views(0, 2), views(1, 2), strict=True):
        assert torch.equal(one, torch.cat(parts))
    assert all(map(torch.equal, whole[3:], views(0, 1, start=3)))


def test_what_else_is_drawn_for_a_batch_follows_from_its_step() -> None:
    def drawn(start: int) -> list[int]:
        found = steps(Order(1, 10, 6, 32), "affine", 8, start)
        return [int(torch.randint(2**31, (), generator=step.random)) for step in found]

    assert len(set(drawn(0))) == 6 and drawn(0)[3:] == drawn(3)


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


@pytest.mark.parametrize("kind", KINDS)
def test_views_of_some_rows_are_the_rows_of_all_views(kind: str) -> None:
    before, views = images(), draw(kind, 16, 32, 32, seeded())
    assert torch.equal(apply_views(before[5:9], views.rows(slice(5, 9))), apply_views(before, views)[5:9])


def test_an_alternating_flip_shows_both_views_of_every_image_in_two_epochs() -> None:
    order = Order(seed=1, count=50, batch_size=12, length=4 * 50)  # batches across the ends of epochs
    seen = torch.zeros(4, 50, dtype=torch.bool)
    found = list(steps(order, "crop-altflip", 8, 0))
    for number, step in enumerate(found):
        assert step.views.window is not None
        epochs = torch.arange(number * 12, number * 12 + len(step.positions)) // 50
        seen[epochs, step.positions] = step.views.window[:, 2].bool()
    assert torch.equal(seen[0], ~seen[1]) and torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert 10 < seen[0].sum() < 40  # a fair coin for each image


def test_unknown_kinds_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="crop-flop"):
        augment(images(), "crop-flop", seeded())


def test_crop_is_the_window_of_the_padded_image() -> None:
    before, pad = images(3, 8, 6), (1, 2)
    top, left, flip = torch.tensor([0, 2, 1]), torch.tensor([4, 0, 2]), torch.tensor([False, True, False])
    after = crop(before, top, left, flip, pad)
    for i in range(3):
        canvas = torch.zeros(3, 10, 10)
        canvas[:, 1:9, 2:8] = before[i]
        window = canvas[:, int(top[i]) : int(top[i]) + 8, int(left[i]) : int(left[i]) + 6]
        assert torch.equal(after[i], window.flip(-1) if flip[i] else window)


def test_half_of_the_views_are_flipped_where_the_kind_flips() -> None:
    ramp = torch.linspace(0.1, 1, 32).expand(400, 3, 32, 32)

    def rising(kind: str) -> float:
        middle = augment(ramp, kind, seeded())[:, 0, 16, 8:24]
        return float((middle[:, -1] > middle[:, 0]).float().mean())

    assert rising("shift") == rising("affine") == 1
    assert 0.4 < rising("crop-flip") < 0.6 and 0.4 < rising("rrc-flip") < 0.6


def test_warp_by_the_identity_and_by_whole_pixels_is_exact() -> None:
    before = images(2, 8, 8)
    identity = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]).expand(2, -1, -1)
    # The positions are rounded to about 1e-6 of a pixel.
    assert torch.allclose(warp(before, identity), before, atol=1e-5)
    right = torch.tensor([[[1.0, 0, 2 * 2 / 8], [0, 1, 0]]]).expand(2, -1, -1)
    moved = warp(before, right)
    assert torch.allclose(moved[..., :6], before[..., 2:], atol=1e-5)
    assert torch.allclose(moved[..., 6:], before[..., 6:].flip(-1), atol=1e-5)  # reflected at the border


@pytest.mark.parametrize("size", [(32, 32), (8, 12), (7, 5)])
def test_positions_are_those_of_affine_grid(size: tuple[int, int]) -> None:
    """Only what every image shares is made once; products of odd sizes may be summed in another order."""
    before, matrix = images(6, *size), torch.randn(6, 2, 3, generator=seeded())
    grid = F.affine_grid(matrix, list(before.shape), align_corners=False)
    wanted = F.grid_sample(before, grid, padding_mode="reflection", align_corners=False)
    torch.testing.assert_close(warp(before, matrix), wanted, rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("kind", ["crop-flip-cutout", "affine-colour-cutout"])
def test_a_square_of_half_the_side_becomes_grey_and_the_rest_is_as_without_it(kind: str) -> None:
    """Around any pixel, so that it may lie partly outside; views before it are those of the kind without it."""
    before = images(400)
    views, plain = draw(kind, 400, 32, 32, seeded()), draw(kind.removesuffix("-cutout"), 400, 32, 32, seeded())
    assert views.hole is not None
    after, without = apply_views(before, views), apply_views(before, plain)
    grey = torch.zeros(400, 32, 32, dtype=torch.bool)
    for i, (top, left, high, wide) in enumerate(views.hole.tolist()):
        assert top >= 0 and top + high <= 32 and left >= 0 and left + wide <= 32 and min(high, wide) >= 8
        grey[i, top : top + high, left : left + wide] = True
    assert (after[grey[:, None].expand_as(after)] == 0.5).all()
    assert torch.equal(after[~grey[:, None].expand_as(after)], without[~grey[:, None].expand_as(after)])
    assert views.hole[:, 2:].max() == 16 and grey.any(0).all()
