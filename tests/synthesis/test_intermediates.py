"""Clean estimates along a trajectory as images of their own: which, whose, and the same however they are asked for."""

import json

import pytest
import torch

from dfkd.config import GenerateConfig
from dfkd.data import open_folder
from dfkd.errors import UsageError
from dfkd.synthesis.intermediates import Intermediates, kept_steps
from dfkd.synthesis.methods import make_method
from dfkd.synthesis.plan import make_plan, predict
from dfkd.synthesis.run import generate
from tests.synthesis.small_networks import SETTINGS, SmallPrior, classifier, pipeline

SEED, STEPS, KEPT = 11, 6, 2
EACH = KEPT + 1
SMALL = {"steps": STEPS, "keep_intermediates": KEPT, "sampler": "ddpm"}


def around(**own):
    config = GenerateConfig.of(**{**SETTINGS, **SMALL, **own})
    return make_method(config, SmallPrior(), classifier())


def test_the_steps_are_those_of_the_published_program():
    """Every fifth of the steps, the last left out: (step + 1) % (steps // 5) == 0."""
    for steps in (10, 50, 70):
        published = [i for i in range(steps - 1) if (i + 1) % (steps // 5) == 0 and i + 1 != steps]
        assert list(kept_steps(steps, 4)) == published and len(published) == 4
    assert kept_steps(7, 4) == (0, 1, 2, 3) and kept_steps(5, 4) == (0, 1, 2, 3) and kept_steps(9, 1) == (3,)


@pytest.mark.parametrize("gradient", ["latent", "unet"])
def test_images_are_the_decoded_estimates_of_their_steps(gradient):
    own = {"gradient": gradient, "bn_stats": "image", "guidance_step": 0.1}
    pipe = pipeline(**{**SMALL, **own})
    clean = {}
    plain = pipe(range(4), seed=SEED, callback_on_step_end=lambda p, i, t, found: clean.update({i: found["clean"]}))
    sample = around(**own)(range(4 * EACH), seed=SEED)
    assert [record.step for record in sample.records] == [1, 3, None] * 4
    assert torch.equal(sample.images[KEPT::EACH], plain.images)
    for place, step in enumerate((1, 3)):
        wanted = (pipe.prior.decode(clean[step]).clamp(0, 1) * 255).round().to(torch.uint8)
        assert torch.equal(sample.images[place::EACH], wanted) and not torch.equal(wanted, plain.images)
    assert sample.labels.tolist() == [label for label in plain.labels.tolist() for _ in range(EACH)]


def test_records_tell_the_step_and_its_losses():
    (first, second, finished, *_) = around(bn_stats="image", guide_from=0.3)(range(EACH), seed=SEED).records
    assert (first.id, second.id, finished.id) == (0, 1, 2) and (first.step, second.step) == (1, 3)
    assert first.losses == {} and first.loss_curve == second.loss_curve == {}  # guidance begins at step 2
    curve = finished.loss_curve
    assert second.losses == {name: values[1] for name, values in curve.items()} and len(curve["cls"]) == 4
    assert finished.losses == {name: values[-1] for name, values in curve.items()}
    assert len({record.teacher_probability for record in (first, second, finished)}) == 3
    assert "step" in first.to_json() and "step" not in finished.to_json()


def test_losses_of_an_estimate_are_those_before_its_image_was_encoded_again():
    plain, again = (
        around(bn_stats="image", **own)(range(EACH), seed=SEED).records
        for own in ({}, {"reencode": 1, "reencode_level": 1.0})
    )
    assert [record.losses for record in again[:KEPT]] == [record.losses for record in plain[:KEPT]]
    assert again[KEPT].losses != plain[KEPT].losses


def test_partners_are_images_of_the_same_place():
    """CutMix behind step 2: the estimate of step 1 has no box yet, that of step 3 has."""
    records = around(cutmix_every=3, group=6, bn_stats="image")(range(6 * EACH), seed=SEED).records
    first, second, finished = records[:EACH]
    assert (first.partner, first.box) == (None, None)
    assert second.box is not None and second.box == finished.box
    assert second.partner % EACH == 1 and finished.partner % EACH == 2
    assert second.partner // EACH == finished.partner // EACH != 0


@pytest.mark.parametrize("own", [{"bn_stats": "image"}, {"bn_stats": "group", "group": 2}])
def test_an_image_follows_from_seed_and_id(own):
    """One by one, in any order, in calls of any size."""
    whole = around(**own)(range(6 * EACH), seed=SEED)
    asked = [7, 16, 0, 3, 8]
    part = around(**{**own, "batch": 2})(asked, seed=SEED)
    assert [record.id for record in part.records] == asked
    # float32: a convolution of two rows rounds otherwise than one of six, and guidance carries it on
    assert (part.images.int() - whole.images[asked].int()).abs().max() <= 1
    assert torch.equal(part.labels, whole.labels[asked])


def test_only_what_is_asked_is_decoded(monkeypatch):
    made = around(bn_stats="image", guidance_step=0)
    decoded = []
    own = made.pipe.prior.decode
    monkeypatch.setattr(made.pipe.prior, "decode", lambda z: (decoded.append(len(z)), own(z))[1])
    made([2, 5], seed=SEED)
    assert decoded == [2]
    made([0], seed=SEED)
    assert decoded == [2, 1, 1]


def test_labels_are_a_trajectorys():
    made = around(bn_stats="image")
    assert made([0, 4, 5], [2, 1, 1], SEED).labels.tolist() == [2, 1, 1]
    with pytest.raises(UsageError, match="labels 2 and 1 in one trajectory: images 0 to 2 are of one"):
        made([0, 1], [2, 1])


@pytest.mark.parametrize("own", [{"bn_stats": "image", "batch": 4}, {"group": 2, "batch": 5, "only": "two,zero"}])
def test_folders_hold_whole_trajectories_and_are_continued(own, tmp_path):
    """Calls of as many trajectories as a network call holds; a count that ends inside a trajectory is kept."""
    made, calls = around(**own), []
    inner = made.pipe.packs
    made.pipe.packs = lambda asked, seed: (calls.append(len(asked)), inner(asked, seed))[1]
    count = 10 * EACH - 1
    pool = generate(made, tmp_path / "a", count, SEED)
    assert calls == [4, 4, 2] and len(pool.labels) == count
    classes = made.classes
    assert pool.labels.tolist() == [classes[i // EACH % len(classes)] for i in range(count)]
    steps = [record.step for record in open_folder(tmp_path / "a").records()]
    assert steps == ([1, 3, None] * 10)[:count]
    shard = next((tmp_path / "a").glob("shard-*.tar"))
    content = shard.read_bytes()
    shard.unlink()
    generate(around(**own), tmp_path / "a", count, SEED)
    assert shard.read_bytes() == content
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["run"]["call_size"] == own["batch"]


def test_a_plan_counts_the_decoding_of_all_snapshots():
    made, plain = around(batch=14), pipeline(steps=STEPS, batch=14, sampler="ddpm")
    plan, alone = make_plan(made, made.config), make_plan(plain, plain.config)
    assert (plan.call_size, plan.group, plan.images) == (14, 7, 14 * EACH) and alone.images == 14
    calls, once = (predict(pipe, found, "npy") for pipe, found in ((made.pipe, plan), (plain, alone)))
    assert calls["decode"].calls == EACH * once["decode"].calls and calls["write"].calls == 14 * EACH
    assert calls["unet"].calls == once["unet"].calls and calls["gradient"].calls == once["gradient"].calls


def test_an_image_that_is_not_finite_goes_by_its_own_id(monkeypatch):
    """And not by that of its trajectory."""
    made = around(bn_stats="image", guidance_step=0)
    own = made.pipe.prior.decode
    spoilt = torch.tensor([1.0, float("nan"), 1.0])[:, None, None, None]
    monkeypatch.setattr(made.pipe.prior, "decode", lambda z: own(z) * spoilt)
    with pytest.raises(UsageError, match=r"the images \[5\] are not finite"):
        made(range(3 * EACH), seed=SEED)


def test_the_best_of_several_trajectories_has_its_own_estimates():
    """--candidates around --keep-intermediates: an image is chosen among those of its own step and label."""
    own = {"bn_stats": "image", "guidance_step": 0, "candidates": 2, "keep": "sure"}
    plain, chosen = around(bn_stats="image", guidance_step=0), around(**own)
    once, best = plain(range(4 * EACH), seed=SEED), chosen(range(4 * EACH), seed=SEED)
    assert [record.step for record in best.records] == [record.step for record in once.records]
    assert torch.equal(best.labels, once.labels) and not torch.equal(best.images, once.images)


def test_progress_reaches_the_end_once():
    made, told = around(bn_stats="image", batch=2), []
    made.on_progress = told.append
    made(range(4 * EACH), seed=SEED)
    assert told == sorted(told) and told[-1] == 1 and len(told) == 2 * STEPS


def test_refusals():
    with pytest.raises(ValueError, match="--keep-intermediates 6 needs more steps than --steps 6"):
        around(keep_intermediates=6)
    with pytest.raises(UsageError, match="--keep-intermediates 2 with --method noise: it has no denoising steps"):
        around(method="noise")
    assert isinstance(around(), Intermediates) and not isinstance(around(keep_intermediates=0), Intermediates)
