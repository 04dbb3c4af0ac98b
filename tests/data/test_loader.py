"""Every source gives the same batches."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd.data import (
    KINDS,
    Batch,
    Form,
    ImageFiles,
    Images,
    LoaderChoice,
    Order,
    Pool,
    Source,
    choose_loader,
    dali,
    list_folder,
    open_data,
    open_folder,
    open_source,
    read_folder,
    steps,
)
from dfkd.errors import UsageError
from tests.shard_folders import class_folders, make

NO_DALI = pytest.mark.skipif(not dali.installed(), reason="NVIDIA DALI is not installed")
CPU, GPU, HUGE = torch.device("cpu"), torch.device("cuda"), 10**9
ROWS = torch.tensor([0, 1, 3, 4, 5, 7, 8, 9])
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NAMES = ("resident", "torch", pytest.param("dali", marks=[pytest.mark.dali, NO_DALI]))
# Of a normalised value. A level is 1 / 255 / 0.2 = 0.02 of them. DALI normalises with one multiplication and one
# subtraction where we have two and a division, and looks warped positions up with an error of about 1e-5 of a pixel.
ROUNDING = {"resident": 0.0, "torch": 0.0, "dali": 2e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of 8x8 in three shards, which nobody changes."""
    return make(tmp_path_factory.mktemp("shards"))


def form(size: int = 8, dtype: torch.dtype = torch.float32, resize: str = "antialias") -> Form:
    return Form(size, MEAN, STD, CPU, dtype, resize)


def opened(
    name: str, data: Path | Images, kind: str = "none", wanted: Form | None = None, workers: int = 0, kept: bool = False
) -> Source:
    data = open_folder(data) if isinstance(data, Path) else data
    return open_source(LoaderChoice(name, "", kept), data, ROWS, wanted or form(), kind, 100, workers)


def batches(source: Source, order: Order, kind: str = "none", start: int = 0) -> Iterator[Batch]:
    return source.batches(steps(order, kind, source.form.size, start))  # type: ignore[attr-defined]


def assert_same(one: Batch, other: Batch, rounding: float = 0.0) -> None:
    assert torch.equal(one.ids, other.ids) and torch.equal(one.labels, other.labels)
    assert one.images.shape == other.images.shape and one.images.dtype == other.images.dtype
    assert (one.images - other.images).abs().max() <= rounding


def pixels(images: Tensor) -> Tensor:
    """Levels 0 to 255 as they were before normalisation."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.float() * std + mean) * 255


def overwritten(data: bytes) -> bytes:
    """Image 5 with 64 of its bytes at 0."""
    start = data.index(b"\x89PNG", data.index(b"00000005.png")) + 40
    return data[:start] + bytes(64) + data[start + 64 :]


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_the_images_of_their_ids(folder: Path, name: str) -> None:
    pool = read_folder(folder)
    found = list(batches(opened(name, folder), Order(0, 8, 4, 8)))
    assert sorted(torch.cat([batch.ids for batch in found]).tolist()) == ROWS.tolist()
    for batch in found:
        # (x / 255 - mean) / std and back: a few roundings of numbers below 4, times 255.
        assert (pixels(batch.images) - pool.images[batch.ids]).abs().max() < 1e-3
        assert torch.equal(batch.labels, pool.labels[batch.ids])
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.images.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_a_source_gives_what_the_resident_one_gives_from_any_step(folder: Path, name: str, kind: str) -> None:
    order = Order(seed=3, count=8, batch_size=3, length=23)
    whole = list(batches(opened("resident", folder, kind), order, kind))
    assert len(whole) == 8
    source = opened(name, folder, kind)
    for start in (5, 0):
        for one, other in zip(whole[start:], batches(source, order, kind, start), strict=True):
            assert_same(one, other, ROUNDING[name])


def test_worker_processes_give_the_same(folder: Path) -> None:
    order = Order(seed=3, count=8, batch_size=3, length=23)
    whole = list(batches(opened("resident", folder, "shift"), order, "shift"))
    source = opened("torch", folder, "shift", workers=2)
    first = batches(source, order, "shift")
    assert_same(next(first), whole[0])
    first.close()  # type: ignore[attr-defined]
    for one, other in zip(whole[5:], batches(source, order, "shift", 5), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_a_source_that_was_left_in_the_middle_begins_again(folder: Path, name: str) -> None:
    source, order = opened(name, folder), Order(seed=3, count=8, batch_size=2, length=24)
    first = batches(source, order)
    kept = [next(first) for _ in range(3)]
    first.close()  # type: ignore[attr-defined]
    again = list(batches(source, order))
    assert len(again) == 12
    for one, other in zip(kept, again, strict=False):
        assert_same(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_share_out_what_one_has(folder: Path, name: str) -> None:
    whole, *ranks = (
        batches(opened(name, folder, "shift"), Order(1, 8, 5, 16, rank, world), "shift")
        for rank, world in ((0, 1), (0, 2), (1, 2))
    )
    for one, *parts in zip(whole, *ranks, strict=True):
        for field in ("images", "labels", "ids"):
            assert torch.equal(getattr(one, field), torch.cat([getattr(part, field) for part in parts]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounding_of_float32(folder: Path, name: str, dtype: torch.dtype) -> None:
    order = Order(0, 8, 8, 8)
    (exact,) = batches(opened(name, folder, "affine"), order, "affine")
    (half,) = batches(opened(name, folder, "affine", form(dtype=dtype)), order, "affine")
    assert half.images.dtype == dtype and half.images.is_contiguous(memory_format=torch.channels_last)
    rounded = exact.images.to(dtype).float()
    # DALI's cast of its own float32 is not of ours: a value on the edge between two of the type may fall to either.
    assert (half.images.float() - rounded).abs().max() <= (torch.finfo(dtype).eps * 4 if name == "dali" else 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("image_format", ["jpg", "npy"])
def test_pixels_before_the_view_are_those_of_pillow(tmp_path: Path, name: str, image_format: str) -> None:
    pool = read_folder(make(tmp_path, image_format=image_format, size=24))
    (one,) = batches(opened(name, tmp_path, wanted=form(24)), Order(0, 8, 8, 8))
    assert (pixels(one.images) - pool.images[one.ids]).abs().max() < 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("resize", "antialias"), [("antialias", True), ("published", False)])
def test_images_are_brought_to_the_size_of_the_networks(folder: Path, name: str, resize: str, antialias: bool) -> None:
    pool = read_folder(folder)
    for data in (folder, pool):  # from files, and from memory
        (one,) = batches(opened(name, data, wanted=form(4, resize=resize)), Order(0, 8, 8, 8))
        images = pool.images[one.ids].float()
        wanted = F.interpolate(images, size=[4, 4], mode="bicubic", antialias=antialias).clamp(0, 255)
        assert (pixels(one.images) - wanted).abs().max() <= 0.501  # rounded to a level


@pytest.mark.parametrize("name", NAMES)
def test_images_in_memory_need_no_folder(name: str) -> None:
    images = torch.randint(0, 256, (10, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pool = Pool(images, torch.arange(10) % 2, torch.arange(10) + 100, ("a", "b"))
    (batch,) = batches(opened(name, pool), Order(0, 8, 8, 8))
    assert (pixels(batch.images) - images[batch.ids - 100]).abs().max() < 1e-3


@pytest.mark.parametrize("name", NAMES[1:])
def test_image_files_and_joined_folders_come_as_they_are_read(folder: Path, tmp_path: Path, name: str) -> None:
    fitted = ImageFiles(list_folder(class_folders(tmp_path / "any", sizes=(9, 16))), 8)
    same = open_data([folder, class_folders(tmp_path / "same")])
    mixed = open_data([folder, tmp_path / "any"])
    for data, levels in ((fitted, 1.01), (same, 1e-3), (mixed, 1.01)):  # DALI fits in float
        (one,) = batches(opened(name, data), Order(0, 8, 8, 8))
        at = torch.tensor([data.ids.tolist().index(number) for number in one.ids.tolist()])
        assert (pixels(one.images) - data.read(at)).abs().max() < (levels if name == "dali" else 1e-3)


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("harm", [lambda data: b"", lambda data: data[: len(data) // 3], overwritten])
def test_a_shard_that_is_damaged_on_the_way_is_named_with_the_image(
    tmp_path: Path, name: str, harm: Callable[[bytes], bytes]
) -> None:
    source = opened(name, make(tmp_path))
    victim = tmp_path / "shard-00001.tar"
    victim.write_bytes(harm(victim.read_bytes()))
    with pytest.raises(UsageError, match=r"^\S*shard-00001\.tar: image [4567] cannot be read"):
        list(batches(source, Order(0, 8, 4, 8)))


def test_a_worker_names_a_damaged_image(tmp_path: Path) -> None:
    source = opened("torch", make(tmp_path), workers=1)
    (tmp_path / "shard-00001.tar").write_bytes(b"")
    with pytest.raises(UsageError, match=r"^\S*shard-00001\.tar: image [4567] cannot be read"):
        list(batches(source, Order(0, 8, 4, 8)))


@pytest.mark.dali
@NO_DALI
@pytest.mark.parametrize("size", [8, 4])
def test_decoded_once_or_as_needed_it_is_the_same(folder: Path, size: int) -> None:
    order = Order(3, 8, 3, 16)
    kept, streamed = (opened("dali", folder, "affine-colour", form(size), kept=kept) for kept in (True, False))
    # Of another size, it is torch that makes the view of what is streamed.
    rounding = 0.0 if size == 8 else ROUNDING["dali"]
    both = (batches(source, order, "affine-colour") for source in (kept, streamed))
    for one, other in zip(*both, strict=True):
        assert_same(one, other, rounding)


def test_the_choice_is_by_size_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfkd.data.loader._free_memory", lambda device: 10**9)
    monkeypatch.setattr(dali, "installed", lambda: True)
    small, large = choose_loader("auto", 1000, 32, CPU), choose_loader("auto", HUGE, 512, CPU)
    assert small.name == "resident" and "3.1 MB" in small.why
    assert (large.name, large.kept) == ("dali", False) and "as they are needed" in large.why
    assert choose_loader("auto", 1000, 32, GPU).name == "resident"
    assert choose_loader("auto", HUGE, 32, GPU).name == "dali"
    assert not choose_loader("dali", 1000, 32, GPU).kept and choose_loader("dali", 1000, 32, CPU).kept
    assert choose_loader("torch", 10, 32, CPU).name == "torch"


def test_without_dali_it_is_refused_and_auto_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "installed", lambda: False)
    with pytest.raises(UsageError, match="--loader dali: NVIDIA DALI is not installed"):
        choose_loader("dali", 10, 32, CPU)
    assert choose_loader("auto", 10, 32, CPU).name == "resident"
    choice = choose_loader("auto", HUGE, 32, CPU)
    assert choice.name == "torch" and "NVIDIA DALI is not installed" in choice.why
