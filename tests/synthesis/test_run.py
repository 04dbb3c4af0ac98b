"""A run into shards: what is missing and nothing else, the same bytes whenever it is done, records of what was done."""

import dataclasses

import pytest
import torch

from dfkd.errors import UsageError
from dfkd.data.shards import ShardFolder, read_folder
from dfkd.synthesis.guidance import Guidance, LossWeights
from dfkd.synthesis.run import Rows, Synthesis, synthesise
from dfkd.synthesis.sampler import SamplerSettings
from dfkd.synthesis.schedule import build_table
from tests.synthesis.small_networks import CLASS_NAMES, SCHEDULER, SmallPrior, classifier

COUNT, GROUP, SHARD, STEPS = 11, 4, 8, 3  # the last group of the last shard is sampled whole and one image dropped


@pytest.fixture
def synthesis():
    prior, teacher = SmallPrior(), classifier()
    return Synthesis(
        prior=prior,
        teacher=teacher,
        guidance=Guidance(prior.decode, teacher, LossWeights(0.1, 1.0)),
        table=build_table(SCHEDULER, "ddpm", STEPS),
        settings=SamplerSettings(cutmix_every=1),
        seed=3,
        classes=(2, 0),
        group=GROUP,
        prompt="a {label}",
        negative_prompt="",
        latent_size=prior.latent_size,
        device=torch.device("cpu"),
    )


def open_shards(path, **settings):
    return ShardFolder.create_or_open(path, {"seed": 3, **settings}, CLASS_NAMES, 8, "png", COUNT, SHARD)


def run(path, synthesis, micro=3, done=None):
    with open_shards(path) as folder:
        return synthesise(folder, synthesis, Rows(micro, micro, micro), (done if done is not None else []).append)


def shards(path):
    return {file.name: file.read_bytes() for file in sorted(path.glob("shard-*"))}


def test_a_run_and_its_records(synthesis, tmp_path):
    advanced = []
    result = run(tmp_path, synthesis, done=advanced)
    assert (result.images, result.shards, result.shards_before) == (COUNT, 2, 0) and result.seconds > 0
    assert advanced == [4, 4, 3]
    pool = read_folder(tmp_path)
    assert pool.ids.tolist() == list(range(COUNT)) and pool.labels.tolist() == [2, 0] * 5 + [2]
    for record in pool.records:
        name = CLASS_NAMES[record.label]
        assert (record.class_name, record.prompt, record.seed) == (name, f"a {name}", 3)
        assert record.partner is not None and record.partner // GROUP == record.id // GROUP
        assert (record.partner - record.id) % 2 == 0  # of the same class: classes alternate
        assert record.box is not None and len(record.box) == 4
        assert {n: len(curve) for n, curve in record.loss_curve.items()} == {"bn": STEPS, "cls": STEPS}
        assert record.losses == {name: curve[-1] for name, curve in record.loss_curve.items()}
    shown = synthesis.teacher.logits(pool.images / 255).softmax(1)
    sure = torch.tensor([record.teacher_probability for record in pool.records])
    torch.testing.assert_close(sure, shown.gather(1, pool.labels[:, None])[:, 0], rtol=1e-4, atol=1e-5)  # five digits


def test_started_again_it_does_what_is_missing(synthesis, tmp_path, monkeypatch):
    run(tmp_path, synthesis)
    before = shards(tmp_path)
    assert run(tmp_path, synthesis).images == 0
    sampled = []
    sample = Synthesis.sample
    monkeypatch.setattr(
        Synthesis, "sample", lambda self, group, *rows: (sampled.append(group), sample(self, group, *rows))[1]
    )
    (tmp_path / "shard-00001.tar").unlink()
    result = run(tmp_path, synthesis)
    assert (result.images, result.shards, result.shards_before) == (3, 1, 1) and sampled == [2]
    assert shards(tmp_path) == before


def test_a_damaged_shard_is_repaired(synthesis, tmp_path):
    run(tmp_path, synthesis)
    before = shards(tmp_path)
    file = tmp_path / "shard-00000.tar"
    damaged = bytearray(file.read_bytes())
    damaged[700] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UsageError, match=r"shard-00000\.tar was altered"):
        read_folder(tmp_path)
    assert run(tmp_path, synthesis).images == SHARD
    assert shards(tmp_path) == before


def test_interrupted_between_shards(synthesis, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(whole, synthesis)

    def stop(_):
        if len(advanced := [*calls, 1]) == 3:
            raise KeyboardInterrupt
        calls[:] = advanced

    calls = []
    with pytest.raises(KeyboardInterrupt), open_shards(stopped) as folder:
        synthesise(folder, synthesis, Rows(3, 3, 3), stop)
    assert list(shards(stopped)) == ["shard-00000.idx", "shard-00000.tar"]
    run(stopped, synthesis)
    assert shards(stopped) == shards(whole)


def test_a_group_does_not_depend_on_those_before_it(synthesis):
    first = [synthesis.sample(group, 4) for group in (0, 1, 2)]
    alone = synthesis.sample(2, 4)
    assert torch.equal(alone[0], first[2][0]) and alone[1] == first[2][1]


def test_another_micro_batch_gives_the_same_images(synthesis):
    pixels, records = synthesis.sample(1, 4)
    again, others = synthesis.sample(1, 3)
    assert (pixels.int() - again.int()).abs().max() <= 2
    assert [r.label for r in records] == [r.label for r in others]
    assert [(r.partner, r.box) for r in records] == [(r.partner, r.box) for r in others]


def test_another_seed_gives_other_images(synthesis):
    other = dataclasses.replace(synthesis, seed=4)
    assert (synthesis.sample(0, 4)[0].int() - other.sample(0, 4)[0].int()).abs().float().mean() > 5


def test_without_a_teacher_there_are_no_losses(synthesis):
    _, records = dataclasses.replace(synthesis, guidance=None, settings=SamplerSettings()).sample(0, 4)
    assert all(not r.losses and not r.loss_curve and r.partner is None and r.box is None for r in records)
