"""The length of a guidance step by trials: which is taken, kept and taken up again, and that it is what guides."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dfkd.config import GenerateConfig
from dfkd.evaluation.run_folder import _seconds
from dfkd.runtime import Rank
from dfkd.synthesis import pipeline as pipeline_module
from dfkd.synthesis import trials
from dfkd.synthesis.finite import NotFinite
from dfkd.synthesis.methods import make_method
from dfkd.synthesis.run import generate
from dfkd.synthesis.trials import images_of, judged, lengths, try_steps
from tests.synthesis.small_networks import SETTINGS, SmallPrior, classifier, pipeline

SEED = 5
SMALL = {**SETTINGS, "guidance_step": 0.1, "step_trials": 3, "group": 6, "batch": 6, "shard_size": 6, "steps": 2}


def made(**own):
    return make_method(GenerateConfig.of(**{**SMALL, **own}), SmallPrior(), classifier())


def run_of(path):
    return json.loads((path / "manifest.json").read_text())["run"]


def shards_of(path):
    return {file.name: file.read_bytes() for file in path.glob("shard-*.tar")}


def test_lengths_are_powers_of_two_around_the_given_one():
    assert lengths(0.1, 3) == [0.05, 0.1, 0.2] and lengths(0.1, 5) == [0.025, 0.05, 0.1, 0.2, 0.4]
    assert lengths(0.1, 2) == [0.05, 0.1]


def test_the_one_of_the_lowest_score_is_taken():
    pipe, said = pipeline(**SMALL), []
    found = try_steps(pipe, SEED, said.append)
    scores = found["step_trials"]
    assert list(scores) == ["0.05", "0.1", "0.2"] and len(set(scores.values())) == 3
    assert f"{found['guidance_step']:.6g}" == min(scores, key=scores.__getitem__)
    assert pipe.guidance_step == found["guidance_step"]
    assert said[0].startswith(f"step trials: --guidance-step {found['guidance_step']:.6g} is taken (0.05 ")


def test_a_score_is_of_images_that_this_length_guides_and_no_run_has(monkeypatch):
    pipe, seen = pipeline(**SMALL), []
    own = judged
    monkeypatch.setattr(trials, "judged", lambda pipe, sample, seed: (seen.append(sample), own(pipe, sample, seed))[1])
    try_steps(pipe, SEED, lambda line: None)
    for sample, length in zip(seen, (0.05, 0.1, 0.2), strict=True):
        ids = [record.id for record in sample.records]
        assert len(ids) == images_of(pipe) == 36 and min(ids) > 1 << 50
        plain = pipeline(**{**SMALL, "guidance_step": length, "step_trials": 0})
        assert torch.equal(sample.images, plain(ids, seed=SEED).images)
        assert sample.labels.bincount().tolist() == [12, 12, 12]
    assert not torch.equal(seen[0].images, seen[2].images)


def test_statistics_count_where_a_loss_goes_by_them():
    with_bn, without = pipeline(**SMALL), pipeline(**{**SMALL, "bn_weight": 0.0, "group": 1})
    sample = pipeline(**{**SMALL, "step_trials": 0})(range(6), seed=SEED)
    assert judged(with_bn, sample, SEED) > judged(without, sample, SEED) > 0
    assert judged(with_bn, sample, SEED) != judged(with_bn, sample, SEED + 1)  # other views
    by_twos = pipeline(**{**SMALL, "batch": 2})
    # float32: the sums of two rows round otherwise than those of six
    assert judged(by_twos, sample, SEED) == pytest.approx(judged(with_bn, sample, SEED), rel=1e-5)


def test_a_folder_keeps_the_length_and_a_run_that_goes_on_takes_it_up(tmp_path, monkeypatch):
    said = []
    generate(made(), tmp_path / "a", 12, SEED, say=said.append)
    run, shards = run_of(tmp_path / "a"), shards_of(tmp_path / "a")
    assert run["guidance_step"] in (0.05, 0.1, 0.2) and run["step_trials"].keys() == {"0.05", "0.1", "0.2"}
    assert run["prepared_seconds"] > 0 and any(line.startswith("step trials: ") for line in said)
    plain = made(guidance_step=run["guidance_step"], step_trials=0)
    generate(plain, tmp_path / "plain", 12, SEED)
    assert shards == shards_of(tmp_path / "plain") and "guidance_step" not in run_of(tmp_path / "plain")
    (tmp_path / "a/shard-00001.tar").unlink()

    def never(*_):
        raise AssertionError("tried again")

    monkeypatch.setattr(pipeline_module, "try_steps", never)
    generate(made(), tmp_path / "a", 12, SEED)
    assert shards_of(tmp_path / "a") == shards and run_of(tmp_path / "a") == run


def test_seconds_of_the_trials_are_a_runs(tmp_path):
    generate(made(), tmp_path, 12, SEED)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    shards = sum(shard["seconds"] for shard in manifest["shards"])
    assert _seconds(tmp_path) == pytest.approx(shards + manifest["run"]["prepared_seconds"])


def test_killed_in_between_they_are_made_again(tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(pipeline_module, "try_steps", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(made(), tmp_path / "a", 6, SEED)
    generate(made(), tmp_path / "a", 6, SEED)
    generate(made(), tmp_path / "b", 6, SEED)
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b") != {}


def test_lengths_that_give_no_finite_images_are_no_choice(monkeypatch):
    pipe, own = pipeline(**SMALL), pipeline_module.GuidedPipeline.__call__

    def short(self, *args, **named):
        if self.guidance_step > 0.07:
            raise NotFinite("images", "so", "do")
        return own(self, *args, **named)

    monkeypatch.setattr(pipeline_module.GuidedPipeline, "__call__", short)
    found = try_steps(pipe, SEED, lambda line: None)
    assert found["guidance_step"] == 0.05 and found["step_trials"]["0.2"] is None
    with pytest.raises(NotFinite):
        try_steps(pipeline(**{**SMALL, "guidance_step": 1.0}), SEED, lambda line: None)


def test_nothing_is_tried_where_no_step_is_guided():
    assert made(guidance_step=0.0).prepares == () and made(guide_from=1.0).prepares == ()
    assert made().prepares == ("guidance_step",)


def test_one_trial_is_refused():
    with pytest.raises(ValueError, match="--step-trials 1 has nothing to choose from"):
        made(step_trials=1)


def test_processes_that_share_a_folder_go_by_the_trials_of_the_first(tmp_path, monkeypatch):
    """The second waits for what the first has found, and tries nothing itself."""
    tried, own = [], pipeline_module.try_steps
    monkeypatch.setattr(
        pipeline_module, "try_steps", lambda pipe, *more: (tried.append(pipe), time.sleep(0.3), own(pipe, *more))[2]
    )
    synthesizers = [made(), made()]

    def share(index):
        generate(synthesizers[index], tmp_path / "both", 12, SEED, rank=Rank(index, 2))

    with ThreadPoolExecutor(2) as processes:
        list(processes.map(share, range(2)))
    assert tried == synthesizers[:1]
    assert synthesizers[1].guidance_step == synthesizers[0].guidance_step
    generate(made(), tmp_path / "one", 12, SEED)
    assert shards_of(tmp_path / "both") == shards_of(tmp_path / "one") and len(shards_of(tmp_path / "one")) == 2
