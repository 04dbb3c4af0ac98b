from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dfkd.distillation.loader import Batch, Loader, Order, Resident, Streamed, choose
from dfkd.errors import UsageError
from dfkd.shards import open_folder, read_folder
from tests.shard_folders import make

CPU = torch.device("cpu")
ROWS = torch.tensor([0, 1, 3, 4, 5, 7, 8, 9])


def both(path: Path, order: Order, size: int = 8, workers: int = 2) -> tuple[Loader, Loader]:
    index = open_folder(path)
    return Resident(index, ROWS, order, size, CPU), Streamed(index, ROWS, order, size, CPU, workers)


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("images", "labels", "ids"))


def test_both_sources_give_the_same_batches_from_any_step(tmp_path: Path) -> None:
    make(tmp_path)
    resident, streamed = both(tmp_path, Order(seed=3, count=8, batch_size=3, length=24))
    whole = list(resident.batches(0))
    assert len(whole) == 8
    assert all(map(same, whole, streamed.batches(0)))
    assert all(map(same, whole[5:], resident.batches(5)))
    assert all(map(same, whole[5:], streamed.batches(5)))


def test_batches_are_the_images_of_their_ids(tmp_path: Path) -> None:
    pool = read_folder(make(tmp_path))
    for batch in Resident(pool, ROWS, Order(0, 8, 4, 8), 8, CPU).batches(0):
        assert torch.equal((batch.images * 255).round().to(torch.uint8), pool.images[batch.ids])
        assert torch.equal(batch.labels, pool.labels[batch.ids])
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.images.dtype == torch.float32 and batch.images.max() <= 1


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


def test_the_order_follows_the_seed_and_not_the_batch_size() -> None:
    def stream(seed: int, batch_size: int) -> list[int]:
        order = Order(seed, 50, batch_size, 100)
        return torch.cat([order.batch(step) for step in range(order.steps)]).tolist()  # type: ignore[no-any-return]

    assert stream(1, 7) == stream(1, 20)
    assert stream(1, 7) != stream(2, 7)


def test_images_are_brought_to_the_size_of_the_networks_once(tmp_path: Path) -> None:
    pool = read_folder(make(tmp_path))
    resident, streamed = both(tmp_path, Order(0, 8, 8, 8), size=4, workers=0)
    (one,), (other,) = resident.batches(0), streamed.batches(0)
    wanted = F.interpolate(pool.images[one.ids].float(), size=[4, 4], mode="bicubic").clamp(0, 255) / 255
    assert same(one, other)
    assert (one.images - wanted).abs().max() <= 0.501 / 255  # rounded to a level


def test_a_damaged_shard_is_named_through_the_workers(tmp_path: Path) -> None:
    index = open_folder(make(tmp_path))
    (tmp_path / "shard-00001.tar").write_bytes(b"")
    with pytest.raises(UsageError, match=r"^\S*shard-00001\.tar: image \d"):
        list(Streamed(index, ROWS, Order(0, 8, 4, 8), 8, CPU, 1).batches(0))


def test_the_choice_is_by_size_and_says_why() -> None:
    assert choose("auto", 1000, 32, CPU)[0] == "resident"
    source, reason = choose("auto", 10**9, 512, CPU)
    assert source == "torch" and "MB" in reason
    assert choose("torch", 10, 32, CPU)[0] == "torch"
