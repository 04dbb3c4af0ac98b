"""Several teachers guide: jointly, as the written-out sum does in float64, and one each, as that teacher alone does."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd.config import GenerateConfig
from dfkd.data import open_folder
from dfkd.errors import UsageError
from dfkd.synthesis.command import wanted_of
from dfkd.synthesis.guidance import Guidance, identity
from dfkd.synthesis.joint import JointGuidance
from dfkd.synthesis.losses import Adversarial, BatchNormLoss, CrossEntropy, GuidanceLoss
from dfkd.synthesis.methods import make_method
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd.synthesis.run import generate
from dfkd.teachers.committee import Committee
from tests.synthesis.small_networks import SETTINGS, SmallPrior, bn_inputs, classifier, pipeline, plain_bn_loss

LABELS = torch.tensor([0, 2, 4, 2, 1, 3, 0])  # the class "two" is known to both, the others to one
WEIGHTS = (1.0, 3.0)


def committee(dtype: torch.dtype = torch.float64, count: int = 2) -> Committee:
    """zero, one, two at 8 pixels, and two, three, four at 12."""
    second = classifier(3, size=12, dtype=dtype).replace(class_names=("two", "three", "four"))
    return Committee.of((classifier(0, dtype=dtype), second)[:count], WEIGHTS[:count])


def losses(stats: str = "group") -> tuple[GuidanceLoss, ...]:
    return CrossEntropy(0.7), BatchNormLoss(0.3, stats, "relative")


def written_out(prior: SmallPrior, teachers: Committee, z0: Tensor, stats: str) -> Tensor:
    """The gradient in z0 of every image's losses by every member that knows it, times the member's share."""
    leaf = z0.clone().requires_grad_()
    images, total = prior.decode(leaf), torch.zeros_like(z0[:, :1, 0, 0].sum())
    for member in teachers.members:
        rows = [i for i, label in enumerate(LABELS.tolist()) if label in member.classes]
        own = torch.tensor([member.classes.index(int(LABELS[i])) for i in rows])
        sums = [sum(m.weight for m in teachers.knowing(int(LABELS[i]))) for i in rows]
        share = torch.tensor([member.weight / s for s in sums], dtype=z0.dtype)
        logits, inputs = bn_inputs(member.classifier, images[rows])
        total = total + 0.7 * (share * F.cross_entropy(logits, own, reduction="none")).sum()
        if stats == "image":
            each = [plain_bn_loss([(x[n : n + 1], layer) for x, layer in inputs], "relative") for n in range(len(rows))]
            total = total + 0.3 * (share * torch.stack(each)).sum()
        else:  # an image's part of the group's slope, times its share: linear in its own moments
            total = total + 0.3 * _linear(inputs, share, len(rows))
    (gradient,) = torch.autograd.grad(total, leaf)
    return gradient


def _linear(inputs, share: Tensor, size: int) -> Tensor:
    """size * sum_i share_i <d loss / d moments, moments_i>, the slopes of the loss of the members' images held."""
    total = share.new_zeros(())
    moments = [(x.mean((2, 3)), x.square().mean((2, 3)), layer) for x, layer in inputs]
    leaves = [(m.detach().mean(0).requires_grad_(), s.detach().mean(0).requires_grad_()) for m, s, _ in moments]
    loss = share.new_zeros(())
    for (mean, square), (_, _, layer) in zip(leaves, moments, strict=True):
        deviation = torch.sqrt(layer.running_var + layer.eps)
        spread = torch.sqrt(square - mean**2 + layer.eps) / deviation - 1
        loss = loss + (((mean - layer.running_mean) / deviation) ** 2 + spread**2).mean() / len(inputs)
    slopes = torch.autograd.grad(loss, [leaf for pair in leaves for leaf in pair])
    for n, (first, second, _) in enumerate(moments):
        total = total + (share[:, None] * (first * slopes[2 * n] + second * slopes[2 * n + 1])).sum()
    return total  # size images times a mean over them


@pytest.mark.parametrize("stats", ["image", "group"])
@pytest.mark.parametrize("batch", [7, 3, 1])
def test_the_gradient_is_that_of_the_written_out_sum(stats, batch):
    prior, teachers = SmallPrior(dtype=torch.float64), committee()
    z0 = torch.randn(7, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, values = JointGuidance(prior.decode, teachers, losses(stats)).gradient(z0, LABELS, batch)
    wanted = written_out(prior, teachers, z0, stats)
    assert (found - wanted).abs().max() < 1e-10 * wanted.abs().max()
    assert set(values) == {"cls", "bn"} and values["cls"].shape == (7,)


@pytest.mark.parametrize("batch", [4, 2])
def test_a_committee_of_one_guides_as_that_teacher(batch):
    prior, alone = SmallPrior(dtype=torch.float64), committee(count=1)
    z0, labels = torch.randn(4, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    teacher, seen = alone.members[0].classifier, torch.tensor([[1.0, 1, 1, -1]] * 4, dtype=torch.float64)
    for view in (None, seen):
        ours, values = JointGuidance(prior.decode, alone, losses()).gradient(z0, labels, batch, view=view)
        theirs, wanted = Guidance(prior.decode, teacher, losses()).gradient(z0, labels, batch, view=view)
        assert torch.allclose(ours, theirs, rtol=1e-10) and torch.allclose(values["bn"], wanted["bn"])


def test_through_the_denoiser_and_in_pixels():
    prior, alone = SmallPrior(dtype=torch.float64), committee(count=1)
    z, labels = torch.randn(4, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    (context,) = prior.conditions(["a"] * 4)

    def to_latent(z, images):
        return prior.denoise(z, torch.tensor(3.0), context[images])

    pair = JointGuidance(prior.decode, alone, losses()), Guidance(prior.decode, alone.members[0].classifier, losses())
    ours, theirs = (one.gradient(z, labels, 2, to_latent)[0] for one in pair)
    assert torch.allclose(ours, theirs, rtol=1e-10)
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    ours, theirs = (one.with_(identity).gradient(images, labels, 4)[0] for one in pair)
    assert torch.allclose(ours, theirs, rtol=1e-10)


def test_a_student_of_all_classes_disagrees_with_each_about_its_own():
    teachers, prior = committee(), SmallPrior(dtype=torch.float64)
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 5)).double()
    student = teachers.replace(module=module.eval())
    z0 = torch.randn(7, 2, 4, 4, dtype=torch.float64)
    plain = JointGuidance(prior.decode, teachers, losses()).gradient(z0, LABELS, 7)[0]
    adversarial = (*losses(), Adversarial(1.0, "entropy"))  # which acts also where no class is agreed on
    found, values = JointGuidance(prior.decode, teachers, adversarial, student).gradient(z0, LABELS, 7)
    assert values["adv"].shape == (7,) and not torch.allclose(found, plain)


def config(**changes) -> GenerateConfig:
    return GenerateConfig.of(**{**SETTINGS, "group": 6, "batch": 6, "cfg": 1.0, **changes})


def test_a_pipeline_of_several_teachers_draws_all_classes():
    teachers, settings = committee(torch.float32), config(bn_loss="relative", refine_steps=2, noise_edit_steps=1)
    pipe = make_method(settings, SmallPrior(), teachers)
    assert isinstance(pipe, GuidedPipeline) and pipe.class_names == ("zero", "one", "two", "three", "four")
    sample = pipe(range(6), seed=3)
    assert sample.labels.tolist() == [0, 1, 2, 3, 4, 0]
    assert all(record.loss_curve["cls"][-1] > 0 for record in sample.records)
    other = make_method(settings, SmallPrior(), Committee.of([m.classifier for m in teachers.members], (1, 1)))
    assert not torch.equal(other(range(6), seed=3).images[2], sample.images[2])  # "two" is known to both
    assert other.identity() != pipe.identity()


def test_one_teacher_each_is_that_teacher_alone(tmp_path):
    """Group 1 is the second teacher's: bit for bit what its own pipeline makes of these ids and labels."""
    teachers, settings, prior = committee(torch.float32), config(teaching="each"), SmallPrior()
    made = make_method(settings, prior, teachers)
    sample = made(range(12), seed=3)
    assert sample.labels.tolist() == [0, 1, 2, 0, 1, 2, 2, 3, 4, 2, 3, 4]
    assert len({record.teachers for record in sample.records}) == 2
    second = pipeline(prior, teachers.members[1].classifier, group=6, batch=6, cfg=1.0, teaching="each")
    alone = second(range(6, 12), labels=[0, 1, 2, 0, 1, 2], seed=3)
    assert torch.equal(sample.images[6:], alone.images)
    assert [record.class_name for record in sample.records[6:9]] == ["two", "three", "four"]
    assert torch.equal(made([8, 3], seed=3).images, sample.images[[8, 3]])
    generate(made, tmp_path, 24, seed=3, config=settings)
    pool = open_folder(tmp_path)
    assert torch.equal(pool.labels[:12], sample.labels)
    assert [tuple(record.teachers or ()) for record in pool.records()][:12] == [r.teachers for r in sample.records]
    balance = torch.bincount(pool.labels).tolist()
    assert balance == [4, 4, 8, 4, 4]


def test_one_teacher_each_with_snapshots_and_some_classes():
    settings = config(teaching="each", keep_intermediates=1, only=("one", "three"))
    sample = make_method(settings, SmallPrior(), committee(torch.float32))(range(24), seed=3)
    assert sample.labels.tolist() == [1] * 12 + [3] * 12
    with pytest.raises(UsageError, match="label 3 for image 0"):
        make_method(config(teaching="each"), SmallPrior(), committee(torch.float32))([0], labels=[3])


def test_candidates_of_an_image_are_of_its_own_teacher():
    settings = {"teaching": "each", "bn_stats": "image", "steps": 2}  # groups of one: 2^40 is no multiple of five pairs
    plain = make_method(config(**settings), SmallPrior(), committee(torch.float32))(range(8), seed=3)
    made = make_method(config(**settings, candidates=3), SmallPrior(), committee(torch.float32))
    chosen = made(range(8), seed=3)
    assert {record.candidate for record in chosen.records} > {0}
    assert torch.equal(chosen.labels, plain.labels)
    assert [record.teachers for record in chosen.records] == [record.teachers for record in plain.records]
    only = make_method(config(**settings, only=("three", "one")), SmallPrior(), committee(torch.float32))
    assert wanted_of(only) == ["three", "one"]


@pytest.mark.parametrize("method", ["deepinversion", "fast", "cmi", "generative"])
def test_a_method_of_one_teacher_is_refused(method):
    with pytest.raises(UsageError, match="with several --clients"):
        make_method(config(method=method, size=8), None, committee(torch.float32))


def test_what_is_found_before_the_first_image_is_of_one_teacher():
    with pytest.raises(UsageError, match="--step-trials with several --clients"):
        make_method(config(step_trials=3), SmallPrior(), committee(torch.float32))


def test_who_teaches_whom_is_of_the_identity():
    ways = [make_method(config(teaching=way), SmallPrior(), committee(torch.float32)) for way in ("joint", "each")]
    joint, each = (way.identity() for way in ways)
    assert (joint["teaching"], each["teaching"]) == ("joint", "each")
    assert joint["teacher_digest"] == each["teacher_digest"]


def test_engines_are_each_teachers_own(monkeypatch):
    """Twelve teachers: names of engines with the places 1 and 11 are told apart."""
    given: list[dict[str, str] | None] = []

    def use_engines(pipe, before):
        given.append(before)
        return {"gradient": f"key {len(given)}"}

    monkeypatch.setattr(GuidedPipeline, "use_engines", use_engines)
    teachers = Committee.of([classifier(seed) for seed in range(12)])
    made = make_method(config(teaching="each"), SmallPrior(), teachers)
    keys = made.use_engines(None)
    assert list(keys) == [f"{k}/gradient" for k in range(12)]
    made.use_engines(keys)
    assert given[12:] == [{"gradient": f"key {k + 1}"} for k in range(12)]


def test_weights_that_do_not_act_are_told():
    lines = make_method(config(teaching="each"), SmallPrior(), committee(torch.float32)).describe()
    assert any("weights do not act" in line for line in lines)
    equal = Committee.of([member.classifier for member in committee(torch.float32).members])
    assert not any("weights" in line for line in make_method(config(teaching="each"), SmallPrior(), equal).describe())
