"""Images that the teacher does not read as asked: which, said where, and left out by every reader and lost to none."""

import json
import tarfile

import pytest
import torch

from dfkd.config import GenerateConfig, ViewConfig
from dfkd.data import export_imagefolder, open_data, open_folder, read_folder
from dfkd.errors import UsageError
from dfkd.synthesis.filter import Filter, agreement, unguided_view
from dfkd.synthesis.run import generate, identity_of
from dfkd.synthesis.synthesizer import Sample, records_of
from dfkd.synthesis.views import draw, seen
from dfkd.teachers import Classifier
from tests.synthesis.small_networks import CLASS_NAMES

SEED, SIDE = 3, 16


class Shade(torch.nn.Module):
    """Reads the class from the mean of the left quarter: dark, grey or light."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x[..., : x.shape[-1] // 4].mean((1, 2, 3))
        return -((mean[:, None] - torch.tensor([0.0, 0.5, 1.0])) ** 2) * self.weight


def teacher() -> Classifier:
    return Classifier(Shade(), CLASS_NAMES, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), SIDE, "shade").freeze()


class Shades:
    """Image i is of class i % 3 and of its shade, but for the last of every `wrong`, which is of the next one's."""

    name, class_names, image_size, group, needs_prior = "shades", CLASS_NAMES, SIDE, 1, False

    def __init__(self, wrong: int = 4) -> None:
        self.calls, self.wrong = 0, wrong

    def identity(self):
        return {}

    def __call__(self, ids, labels=None, seed=0):
        self.calls += 1
        found = torch.tensor([i % 3 for i in ids])
        shown = torch.tensor([(i + (i % self.wrong == self.wrong - 1)) % 3 for i in ids])
        images = (shown * 127).to(torch.uint8)[:, None, None, None].expand(-1, 3, SIDE, SIDE).contiguous()
        return Sample(images, found, records_of(ids, found, CLASS_NAMES, seed))


def made(least=0.5, views=4, flip=False, wrong=4):
    config = GenerateConfig.of(filter_views=views, filter_agreement=least).filter
    return Filter(Shades(wrong), config, teacher(), flip, 5)


def folder(path, count=12, **own):
    generate(made(**own), path, count, SEED, config=GenerateConfig.of(shard_size=4, batch=4, group=1))
    return path


WRONG = [3, 7, 11]


def test_an_images_agreement_is_the_teachers_share_of_its_views():
    half = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8)
    half[0, :, :, SIDE // 2 :] = 255  # dark on the left, unless it is mirrored
    sample = Sample(half, torch.tensor([0, 0]), records_of([5, 8], torch.tensor([0, 0]), CLASS_NAMES, SEED))
    assert agreement(teacher(), sample, SEED, 20, False, 1).tolist() == [1, 1]
    mirrored = agreement(teacher(), sample, SEED, 20, True, 1)
    assert 0 < mirrored[0] < 1 and mirrored[1] == 1
    views = torch.cat([unguided_view(SEED, torch.tensor([5]), k, SIDE, True) for k in range(20)])
    asked = teacher().logits(seen(half[:1].expand(20, -1, -1, -1).float() / 255, views)).argmax(1)
    assert mirrored[0] == (asked == 0).double().mean()


def test_views_are_none_that_guidance_draws():
    ids, kind = torch.arange(4), ViewConfig.of(guide_shift=2, guide_crop=0.85)
    guided = [draw(kind, SEED, ids, number, SIDE, SIDE) for number in range(20)]
    for number in range(4):
        view = unguided_view(SEED, ids, number, SIDE, False)
        assert not any(torch.equal(view, other) for other in guided)


def test_what_is_dropped_stays_in_its_shard_and_readers_leave_it_out(tmp_path):
    pool = open_folder(folder(tmp_path / "a"))
    kept = [i for i in range(12) if i not in WRONG]
    assert pool.dropped == tuple(WRONG) and pool.ids.tolist() == kept and pool.left_out == ()
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert [shard["dropped"] for shard in manifest["shards"]] == [[3], [7], [11]]
    assert [shard["count"] for shard in manifest["shards"]] == [4, 4, 4]
    with tarfile.open(tmp_path / "a/shard-00000.tar") as tar:
        records = [json.load(tar.extractfile(f"{i:08d}.json")) for i in range(4)]
        assert tar.extractfile("00000003.png").read()
    assert [record["agreement"] for record in records] == [1, 1, 1, 0]
    assert records[3]["dropped"] == "the teacher agrees in 0 of its views, less than 0.5"
    assert not any("dropped" in record for record in records[:3])
    assert [record.id for record in read_folder(tmp_path / "a").records] == kept
    both = open_data([tmp_path / "a", folder(tmp_path / "b", least=0.001)])
    assert len(both.ids) == 18
    assert export_imagefolder(tmp_path / "a") == 9
    assert not list((tmp_path / "a/imagefolder").rglob("00000003.png"))


def test_started_again_nothing_is_made_and_shards_have_the_same_bytes(tmp_path):
    path = folder(tmp_path / "a")
    contents = {file.name: file.read_bytes() for file in path.glob("shard-*.tar")}
    again = made()
    generate(again, path, 12, SEED, config=GenerateConfig.of(shard_size=4, batch=4, group=1))
    assert again.inner.calls == 0
    (path / "shard-00001.tar").unlink()
    generate(again, path, 12, SEED, config=GenerateConfig.of(shard_size=4, batch=4, group=1))
    assert again.inner.calls == 1 and {file.name: file.read_bytes() for file in path.glob("shard-*.tar")} == contents


def test_other_filters_are_other_runs():
    own = [made(), made(least=0.7), made(views=5), made(flip=True), Shades()]
    assert len({str(identity_of(one, SEED)) for one in own}) == 5


def test_nothing_is_left(tmp_path):
    """The run ends so; its images stay."""
    with pytest.raises(UsageError, match=r"none of the 12 images of .* is to be used: the teacher reads none of them"):
        folder(tmp_path, wrong=1)
    assert len(list(tmp_path.glob("shard-*.tar"))) == 3


def test_a_threshold_without_views_is_refused():
    with pytest.raises(ValueError, match="--filter-agreement needs --filter-views"):
        GenerateConfig.of(filter_agreement=0.9)
