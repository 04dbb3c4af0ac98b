"""The guidance gradient against autograd on losses written by hand, and its independence of batches."""

import os
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from dfkd.config import GuidanceConfig
from dfkd.errors import UsageError
from dfkd.synthesis.guidance import Guidance, identity
from dfkd.synthesis.losses import Adversarial, BatchNormLoss, CrossEntropy, GuidanceLoss, Seen, losses_of
from dfkd.synthesis.sampler import unit_rms
from tests.synthesis.small_networks import CHANNELS, SIDE, SmallPrior, classifier, plain_loss

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-9}
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0])
BOTH = (CrossEntropy(0.7), BatchNormLoss(0.3, "image"))
# Kernels run in Triton's interpreter here; natively in tests/kernels.
INTERPRETED = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernel is not interpreted")


@pytest.fixture
def prior():
    return SmallPrior(dtype=F64)


@pytest.fixture
def teacher():
    return classifier(dtype=F64)


def latents(dtype=F64, count=7):
    return torch.randn(count, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(5)).to(dtype)


def by_hand(function, z):
    leaf = z.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


@pytest.mark.parametrize("distance", ["norm", "relative"])
@pytest.mark.parametrize("stats", ["image", "group"])
@pytest.mark.parametrize(
    "kernels, batch", [("torch", 1), ("torch", 3), ("torch", 100), pytest.param("triton", 4, marks=INTERPRETED)]
)
def test_gradient_is_that_of_the_summed_loss(prior, teacher, batch, stats, distance, kernels):
    """In one call and, with a group's statistics in two phases, in several."""
    z, losses = latents(), (CrossEntropy(0.7), BatchNormLoss(0.3, stats, distance))
    gradient, record = Guidance(prior.decode, teacher, losses, kernels=kernels).gradient(z, LABELS, batch)
    expected = by_hand(lambda leaf: plain_loss(prior, teacher, leaf, LABELS, 0.3, 0.7, stats, distance), z)
    torch.testing.assert_close(gradient, expected, **EXACT)
    assert {name: value.shape for name, value in record.items()} == {"cls": (7,), "bn": (7,)}
    total = (0.3 * record["bn"] + 0.7 * record["cls"]).sum()
    torch.testing.assert_close(total, plain_loss(prior, teacher, z, LABELS, 0.3, 0.7, stats, distance), **EXACT)


@pytest.mark.parametrize("stats", ["image", "group"])
@pytest.mark.parametrize("batch", [3, 7])
def test_gradient_through_the_denoiser(prior, teacher, batch, stats):
    z, (context,) = latents(), prior.conditions(list("abcdefg"))
    t = torch.tensor(400.0)

    def to_latent(leaf, images):
        return 1.2 * leaf - 0.6 * prior.denoise(leaf, t, context[images])

    losses = (CrossEntropy(0.7), BatchNormLoss(0.3, stats))
    gradient, _ = Guidance(prior.decode, teacher, losses).gradient(z, LABELS, batch, to_latent)
    everyone = torch.arange(7)
    expected = by_hand(
        lambda leaf: plain_loss(prior, teacher, to_latent(leaf, everyone), LABELS, 0.3, 0.7, stats, "norm"), z
    )
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_an_image_does_not_feel_its_batch(prior, teacher):
    z, guidance = latents(), Guidance(prior.decode, teacher, BOTH)
    together, losses = guidance.gradient(z, LABELS, 7)
    for i in range(7):
        alone, own = guidance.gradient(z[i : i + 1], LABELS[i : i + 1], 1)
        torch.testing.assert_close(alone[0], together[i], **EXACT)
        torch.testing.assert_close(own["bn"][0], losses["bn"][i], **EXACT)


def test_guidance_does_not_fade_with_the_size_of_a_group(prior, teacher):
    """A group of copies of one image has that image's statistics, so every copy gets the image's own gradient."""
    z, label = latents(count=1), LABELS[:1]
    guidance = Guidance(prior.decode, teacher, (CrossEntropy(1.0), BatchNormLoss(1.0, "group")))
    alone, _ = guidance.gradient(z, label, 1)
    many, _ = guidance.gradient(z.expand(6, -1, -1, -1), label.expand(6), 4)
    torch.testing.assert_close(many, alone.expand_as(many), **EXACT)


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=INTERPRETED)])
def test_adversarial_loss_by_hand(prior, teacher, kernels):
    z, student = latents(), classifier(seed=9, dtype=F64, norm=False)
    for network in (teacher, student):  # centred, or one class would win everywhere
        network.module[-1].bias -= network.logits(prior.decode(z)).mean(0)
    guidance = Guidance(prior.decode, teacher, (Adversarial(1.5),), student, kernels=kernels)
    gradient, losses = guidance.gradient(z, LABELS, 3)

    def loss(leaf, teacher_leaf):
        p = teacher.logits(prior.decode(teacher_leaf)).softmax(1)
        q = student.logits(prior.decode(leaf)).softmax(1)
        agree = p.argmax(1) == q.argmax(1)
        return torch.where(agree, -(p * (p.log() - q.log())).sum(1), 0.0), agree

    expected, agree = loss(z, z)
    assert agree.any() and not agree.all()
    torch.testing.assert_close(losses["adv"], expected, **EXACT)
    torch.testing.assert_close(gradient, by_hand(lambda leaf: 1.5 * loss(leaf, z)[0].sum(), z), **EXACT)
    assert (gradient[~agree] == 0).all() and (gradient[agree] != 0).any()


def test_the_power_of_two_is_taken_back_exactly():
    prior, teacher, z = SmallPrior(), classifier(), latents(torch.float32)
    plain, scaled = (
        Guidance(prior.decode, teacher, BOTH, narrow=narrow).gradient(z, LABELS, 3)[0] for narrow in (False, True)
    )
    assert torch.equal(plain, scaled)  # it moves exponents alone


@pytest.mark.parametrize("weight", [1e-12, 1.0, 1e12])
def test_losses_of_any_size_pass_a_decoder_in_float16(weight):
    """Beside float64: 1e-12 would be zero on the way, and 1e12 infinite."""
    prior, teacher, z = SmallPrior(dtype=torch.float16), classifier(), latents(torch.float32)
    losses = (CrossEntropy(weight), BatchNormLoss(weight, "group"))

    def decode(z0):
        return prior.decode(z0.half()).to(z0)

    gradient, _ = Guidance(decode, teacher, losses, narrow=True).gradient(z, LABELS, 7)
    exact = Guidance(prior.doubled().decode, classifier(dtype=F64), losses)
    expected, _ = exact.gradient(z.half().double(), LABELS, 7)
    error = (gradient - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < 0.01  # a dozen roundings to 11 bits, where sums cancel in part
    plain, _ = Guidance(decode, teacher, losses).gradient(z, LABELS, 7)
    assert (weight == 1.0) == bool((plain - expected).norm() < 0.01 * expected.norm())


def test_no_images_gradient_depends_on_anothers_size(prior, teacher):
    """One with a gradient 1e12 times as large, and one without any, are beside it."""
    z, factor = latents(count=3), torch.tensor([1.0, 1e12, 0.0], dtype=F64)

    @dataclass(frozen=True)
    class Weighted(CrossEntropy):
        name = "weighted"

        def __call__(self, seen):
            return super().__call__(seen) * factor[: len(seen.labels)]

    together, alone = (
        Guidance(prior.decode, teacher, (Weighted(1.0),), narrow=True).gradient(z[:count], LABELS[:count], 3)[0]
        for count in (3, 1)
    )
    torch.testing.assert_close(together[:1], alone, **EXACT)
    assert (together[2] == 0).all() and together[1].abs().max() > 1e9 * together[0].abs().max()


def test_a_sure_teachers_gradient_keeps_its_direction():
    """At a probability of 1 - 1e-9, softmax - onehot in float32 would be rounding."""
    prior, teacher, z = SmallPrior(), classifier(), latents(torch.float32)
    with torch.no_grad():
        teacher.module[-1].weight *= 300
        teacher.module[-1].bias *= 300
    exact_prior, exact = SmallPrior(dtype=F64), classifier(dtype=F64)
    exact.module.load_state_dict(teacher.module.state_dict())
    logits = exact.logits(exact_prior.decode(z.double()))
    labels, margin = logits.argmax(1), logits.topk(2).values.diff(dim=1).abs()[:, 0]
    assert ((margin > 18) & (margin < 30)).any()
    got, _ = Guidance(prior.decode, teacher, (CrossEntropy(1.0),)).gradient(z, labels, 7)
    expected, _ = Guidance(exact_prior.decode, exact, (CrossEntropy(1.0),)).gradient(z.double(), labels, 7)
    cosine = F.cosine_similarity(unit_rms(got.double()).flatten(1), unit_rms(expected).flatten(1))
    assert (cosine[margin < 30] > 0.999).all()  # beyond, 1 - p is lost to float64 too


def test_cross_entropy_is_torchs():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    labels = torch.tensor([0, 3, 1, 2, 2])
    got = CrossEntropy(1.0)(Seen(torch.zeros(5, 3, 1, 1), logits, labels))
    torch.testing.assert_close(got, F.cross_entropy(logits, labels, reduction="none"), **EXACT)


def test_guidance_of_pixels_keeps_losses_and_teacher(prior, teacher):
    x = prior.decode(latents())
    guidance = Guidance(prior.decode, teacher, BOTH, narrow=True)
    gradient, _ = guidance.with_(identity).gradient(x, LABELS, 4)
    plain, _ = Guidance(identity, teacher, BOTH).gradient(x, LABELS, 7)
    torch.testing.assert_close(gradient, plain, **EXACT)


@dataclass(frozen=True)
class Spread(GuidanceLoss):
    """For a group: the square of the layers' mean activation, by its moments."""

    needs = frozenset({"moments", "group"})

    def __call__(self, seen):
        return seen.of_group(lambda averages: sum((m1.square().mean(1) for m1, _ in averages), torch.zeros(1)))


def test_a_group_loss_of_ones_own_is_exact_in_two_phases(prior, teacher):
    z, guidance = latents(), Guidance(prior.decode, teacher, (Spread(2.0),))
    (whole, losses), (cut, others) = (guidance.gradient(z, LABELS, batch) for batch in (7, 3))
    torch.testing.assert_close(whole, cut, **EXACT)
    torch.testing.assert_close(losses["spread"], others["spread"], **EXACT)
    assert whole.abs().min() > 0


def test_settings_name_losses_of_weight_above_zero():
    config = GuidanceConfig.of(bn_weight=0.0, cls_weight=0.5, adv_weight=1.5)
    assert losses_of(config) == (CrossEntropy(0.5), Adversarial(1.5))
    config = GuidanceConfig.of(bn_weight=2.0, cls_weight=0.0, bn_stats="image", bn_loss="relative")
    assert losses_of(config) == (BatchNormLoss(2.0, "image", "relative"),)
    with pytest.raises(UsageError, match="is no guidance loss"):
        losses_of(GuidanceConfig.of(loss=(f"{__file__}:latents(count=1)",)))


def test_refusals(prior, teacher):
    without = classifier(dtype=F64, norm=False)
    with pytest.raises(UsageError, match="has no BatchNorm layer"):
        Guidance(prior.decode, without, BOTH)
    Guidance(prior.decode, without, (CrossEntropy(1.0),))
    with pytest.raises(UsageError, match="has no student"):
        Guidance(prior.decode, teacher, (Adversarial(1.0),))
    with pytest.raises(UsageError, match="cls, cls: a name is there twice"):
        Guidance(prior.decode, teacher, (CrossEntropy(1.0), CrossEntropy(2.0)))
    for make, message in (
        (lambda: CrossEntropy(-1.0), "cls is -1.0; it must be >= 0"),
        (lambda: BatchNormLoss(1.0, "batch"), "stats of the loss bn is 'batch'"),
        (lambda: BatchNormLoss(1.0, "image", "square"), "distance of the loss bn is 'square'"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
