import pytest
import torch

from dfkd.data.loader import KINDS, Order, steps
from dfkd.data.loader.views import apply


@pytest.mark.parametrize("batch_size", [1, 3, 8, 11, 100])
def test_every_epoch_shows_each_image_once(batch_size: int) -> None:
    order = Order(seed=0, count=8, batch_size=batch_size, length=5 * 8)
    stream = torch.cat([order.batch(step) for step in range(order.steps)])
    epochs = stream.view(5, 8)
    assert all(sorted(epoch.tolist()) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 5  # and in another order


def test_batches_have_one_size_across_the_ends_of_epochs() -> None:
    order = Order(seed=0, count=10, batch_size=4, length=30)
    assert [len(order.batch(step)) for step in range(order.steps)] == [4] * 7 + [2]
    assert [order.size(step) for step in range(order.steps)] == [4] * 7 + [2]


def test_the_order_follows_the_seed_and_not_the_batch_size() -> None:
    def stream(seed: int, batch_size: int) -> list[int]:
        order = Order(seed, 50, batch_size, 100)
        return torch.cat([order.batch(step) for step in range(order.steps)]).tolist()  # type: ignore[no-any-return]

    assert stream(1, 7) == stream(1, 20)
    assert stream(1, 7) != stream(2, 7)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_partition_every_batch_in_order(world: int) -> None:
    whole = Order(seed=1, count=10, batch_size=6, length=32)
    ranks = [Order(1, 10, 6, 32, rank, world) for rank in range(world)]
    for step in range(whole.steps):
        parts = [order.batch(step) for order in ranks]
        assert torch.equal(torch.cat(parts), whole.batch(step))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_images_view_does_not_depend_on_the_number_of_ranks(kind: str) -> None:
    images = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def views(rank: int, world: int, start: int = 0) -> list[torch.Tensor]:
        found = steps(Order(1, 10, 6, 32, rank, world), kind, 8, start)
        return [apply(images[step.positions], step.views) for step in found]

    whole = views(0, 1)
    for one, *parts in zip(whole, views(0, 2), views(1, 2), strict=True):
        assert torch.equal(one, torch.cat(parts))
    assert all(map(torch.equal, whole[3:], views(0, 1, start=3)))


def test_what_else_is_drawn_for_a_batch_follows_from_its_step() -> None:
    def drawn(start: int) -> list[int]:
        return [
            int(torch.randint(2**31, (), generator=step.random))
            for step in steps(Order(1, 10, 6, 32), "affine", 8, start)
        ]

    assert len(set(drawn(0))) == 6 and drawn(0)[3:] == drawn(3)
