"""One of several images is kept: which, by whose losses, and the same however it is asked for."""

import pytest
import torch
from PIL import Image

from dfkd.config import CandidatesConfig, FilterConfig, GenerateCommand, GenerateConfig
from dfkd.data import open_folder
from dfkd.errors import UsageError
from dfkd.synthesis.candidates import Candidates, pick
from dfkd.synthesis.filter import Filter
from dfkd.synthesis.losses import cross_entropy
from dfkd.synthesis.methods import make_method
from dfkd.synthesis.plan import make_plan, predict
from dfkd.synthesis.run import generate, identity_of
from tests.synthesis.small_networks import SETTINGS, SmallPrior, classifier, pipeline
from tests.synthesis.tinted import Tinted

SEED = 5
SMALL = {**SETTINGS, "bn_stats": "image", "guidance_step": 0.1, "steps": 3, "candidates": 3}


def made(student=None, **own) -> Candidates:
    return make_method(GenerateConfig.of(**{**SMALL, **own}), SmallPrior(), classifier(), student)


def losses(judge, images, labels):
    return cross_entropy(judge.logits(images.float() / 255), labels)


def test_which_of_them():
    scores = torch.tensor([[3.0, 0, 1], [1, 0, 2], [2, 0, 3], [4, 1, 4]])
    assert pick(scores, "sure").tolist() == [1, 0, 0]
    assert pick(scores, "learnable").tolist() == [3, 3, 3]
    assert pick(scores, "medium").tolist() == [2, 1, 1]  # the lower of the middle two; of equal ones in their order
    assert pick(scores[:3], "medium").tolist() == [2, 1, 1]


@pytest.mark.parametrize("keep", ["sure", "medium", "learnable"])
def test_each_image_is_the_one_that_its_losses_choose(keep):
    """Beside images that the method itself makes of the candidates' ids."""
    student = classifier(3) if keep == "learnable" else None
    choosing, plain = made(student, keep=keep, keep_weight=0.5 if student else 1.0), pipeline(**SMALL)
    sample = choosing(range(6), seed=SEED)
    each = [plain([i + k * choosing.stride for i in range(6)], seed=SEED) for k in range(3)]
    of_teacher = torch.stack([losses(classifier(), one.images, one.labels) for one in each])
    scores = of_teacher
    if student:
        scores = torch.stack([losses(student, one.images, one.labels) for one in each]) - 0.5 * of_teacher
    kept = {"sure": scores.argmin(0), "medium": scores.argsort(0)[1], "learnable": scores.argmax(0)}[keep]
    assert len(set(kept.tolist())) > 1  # it is a choice
    assert [record.candidate for record in sample.records] == kept.tolist()
    assert torch.equal(sample.images, torch.stack([each[k].images[i] for i, k in enumerate(kept)]))
    found = torch.tensor([record.score for record in sample.records])
    torch.testing.assert_close(found, scores.gather(0, kept[None])[0], rtol=1e-4, atol=1e-6)  # five digits are kept
    assert [record.id for record in sample.records] == list(range(6))
    assert sample.labels.tolist() == plain(range(6)).labels.tolist()


@pytest.mark.parametrize("own", [{}, {"bn_stats": "group", "group": 2}, {"only": "two,zero"}])
def test_an_image_follows_from_seed_and_id(own):
    """One by one, in any order, in calls of any size; labels are those of the images without a choice."""
    whole = made(**own)(range(6), seed=SEED)
    asked = [4, 0, 3]
    part = made(**{**own, "batch": 2})(asked, seed=SEED)
    assert [record.id for record in part.records] == asked
    assert [record.candidate for record in part.records] == [whole.records[i].candidate for i in asked]
    # float32: a convolution of two rows rounds otherwise than one of six, and guidance carries it on
    assert (part.images.int() - whole.images[asked].int()).abs().max() <= 1
    assert torch.equal(part.labels, whole.labels[asked])


def test_labels_that_are_given_are_those_of_all_candidates():
    assert made()(range(4), [2, 1, 1, 0], SEED).labels.tolist() == [2, 1, 1, 0]


def test_partners_are_places_in_the_same_group():
    records = made(cutmix_every=1, group=6)(range(12), seed=SEED).records
    assert {record.partner // 6 for record in records[:6]} == {0}
    assert {record.partner // 6 for record in records[6:]} == {1}


def test_killed_and_continued_the_folder_has_the_same_bytes(tmp_path):
    settings = {"batch": 2, "shard_size": 4, "group": 2}
    for name in ("whole", "killed"):
        generate(made(**settings), tmp_path / name, 10, SEED)
    shard = tmp_path / "killed/shard-00001.tar"
    content = shard.read_bytes()
    shard.unlink()
    generate(made(**settings), tmp_path / "killed", 10, SEED)
    assert shard.read_bytes() == content == (tmp_path / "whole/shard-00001.tar").read_bytes()
    records = list(open_folder(tmp_path / "whole").records())
    assert all(record.score is not None for record in records) and {record.candidate for record in records} == {0, 1, 2}


def test_other_choices_are_other_images():
    seen = {str(identity_of(made(**own), SEED)) for own in ({}, {"candidates": 5}, {"keep": "sure"})}
    learnable = [made(classifier(student), keep="learnable") for student in (3, 4)]
    assert len(seen | {str(identity_of(one, SEED)) for one in learnable}) == 5
    noise = [make_method(GenerateConfig.of(method="noise", candidates=n, size=8), None, classifier()) for n in (3, 5)]
    assert identity_of(noise[0], SEED) != identity_of(noise[1], SEED)


def test_the_teacher_that_chooses_is_of_the_identity_of_a_method_without_one():
    for kind, own in ((Candidates, CandidatesConfig.of(candidates=3)), (Filter, FilterConfig.of(filter_views=2))):
        more = {"student": None} if kind is Candidates else {"flip": False}
        ways = [kind(Tinted(1), own, teacher=classifier(seed), rows=4, **more) for seed in (0, 0, 1)]
        first, again, other = (identity_of(way, SEED) for way in ways)
        assert first == again != other


def test_a_student_that_comes_later(monkeypatch):
    """Without one nothing is chosen, and one image is made; the method itself is told of the student too."""
    choosing = made(classifier(3), keep="learnable")
    choosing.update(None)
    assert choosing.made == 1 and identity_of(choosing, SEED)["keep_student_digest"] is None
    first = choosing(range(4), seed=SEED)
    assert torch.equal(first.images, pipeline(**SMALL)(range(4), seed=SEED).images)
    assert "candidate" not in first.records[0].to_json()
    told = []
    monkeypatch.setattr(choosing.inner, "update", told.append)
    choosing.update(student := classifier(4))
    assert told == [student] and choosing.made == 3
    assert torch.equal(
        choosing(range(4), seed=SEED).images, made(student, keep="learnable")(range(4), seed=SEED).images
    )


def test_progress_is_that_of_all_candidates():
    choosing, seen = made(), []
    choosing.on_progress = seen.append
    choosing(range(4), seed=SEED)
    assert seen == sorted(seen) and seen[-1] == 1 and len(seen) == 3 * 3
    assert choosing.on_progress == seen.append


def test_a_plan_counts_every_candidate():
    choosing = made()
    pipe = choosing.inner
    found = make_plan(pipe, pipe.config)
    pipe.use_engines(None)
    one, three = (predict(pipe, found, "png", times) for times in (1, choosing.made))
    assert all(three[name].calls == (1 if name == "write" else 3) * one[name].calls for name in one)


@pytest.mark.parametrize(
    "own, wrong",
    [
        ({"keep": "sure"}, "--keep sure needs --candidates above 1"),
        ({"candidates": 2}, "the median of two is the easier one"),
        ({"candidates": 3, "keep_weight": 0.5}, "--keep-weight needs --keep learnable"),
        ({"candidates": 3, "keep": "learnable"}, "--keep learnable needs --student-checkpoint"),
        ({"student_checkpoint": "x", "candidates": 3}, "--student-checkpoint acts only with"),
    ],
)
def test_what_would_not_act_is_refused(own, wrong):
    with pytest.raises(ValueError, match=wrong):
        GenerateCommand.of(out="x", **own)


def test_learnable_without_a_student_is_refused():
    with pytest.raises(UsageError, match="--keep learnable has no student"):
        made(keep="learnable")


def test_a_method_of_images_that_are_there_already_has_no_candidates(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(UsageError, match="--candidates 3 with --method folder: it has 1 images, each once"):
        made(method=f'folder(path="{tmp_path}")')
