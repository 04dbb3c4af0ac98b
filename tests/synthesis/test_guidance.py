"""The guidance gradient against autograd on losses written by hand, and its independence of batches."""

import os

import pytest
import torch
import torch.nn.functional as F

from dfkd.compiled.guidance import CompiledGuidance
from dfkd.synthesis.guidance import Guidance, LossWeights, adversarial_loss, identity
from dfkd.synthesis.sampler import scaled
from dfkd_kernels import soft_kl
from dfkd_kernels.rows import NetworkInput
from tests.synthesis.small_networks import CHANNELS, SIDE, SmallPrior, classifier, plain_loss

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-9}
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0])


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


@pytest.mark.parametrize("kind", ["norm", "relative"])
@pytest.mark.parametrize("stats", ["image", "group"])
@pytest.mark.parametrize("micro", [1, 3, 7, 100])
def test_gradient_is_that_of_the_summed_loss(prior, teacher, micro, stats, kind):
    z = latents()
    weights = LossWeights(0.3, 0.7, bn_stats=stats, bn_loss=kind)
    gradient, losses = Guidance(prior.decode, teacher, weights).gradient(z, LABELS, micro)
    expected = by_hand(lambda leaf: plain_loss(prior, teacher, leaf, LABELS, 0.3, 0.7, stats, kind), z)
    torch.testing.assert_close(gradient, expected, **EXACT)
    assert losses["bn"].shape == losses["cls"].shape == (7,)
    total = (0.3 * losses["bn"] + 0.7 * losses["cls"]).sum()
    torch.testing.assert_close(total, plain_loss(prior, teacher, z, LABELS, 0.3, 0.7, stats, kind), **EXACT)


@pytest.mark.parametrize("stats", ["image", "group"])
@pytest.mark.parametrize("micro", [3, 7])
def test_gradient_through_the_denoiser(prior, teacher, micro, stats):
    z, context = latents(), prior.encode_prompts(list("abcdefg"))
    t = torch.tensor(400.0)
    weights = LossWeights(0.3, 0.7, bn_stats=stats)

    def to_latent(leaf, rows):
        return 1.2 * leaf - 0.6 * prior.denoise(leaf, t, context[rows])

    gradient, _ = Guidance(prior.decode, teacher, weights).gradient(z, LABELS, micro, to_latent)
    everyone = torch.arange(7)
    expected = by_hand(
        lambda leaf: plain_loss(prior, teacher, to_latent(leaf, everyone), LABELS, 0.3, 0.7, stats, "norm"), z
    )
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_an_image_does_not_feel_its_batch(prior, teacher):
    z, guidance = latents(), Guidance(prior.decode, teacher, LossWeights(0.3, 0.7, bn_stats="image"))
    together, losses = guidance.gradient(z, LABELS, 7)
    for i in range(7):
        alone, own = guidance.gradient(z[i : i + 1], LABELS[i : i + 1], 1)
        torch.testing.assert_close(alone[0], together[i], **EXACT)
        torch.testing.assert_close(own["bn"][0], losses["bn"][i], **EXACT)


def test_guidance_does_not_fade_with_the_size_of_a_group(prior, teacher):
    """A group of copies of one image has that image's statistics, so every copy gets the image's own gradient."""
    z, label = latents(count=1), LABELS[:1]
    guidance = Guidance(prior.decode, teacher, LossWeights(1.0, 1.0, bn_stats="group"))
    alone, _ = guidance.gradient(z, label, 1)
    many, _ = guidance.gradient(z.expand(6, -1, -1, -1), label.expand(6), 4)
    torch.testing.assert_close(many, alone.expand_as(many), **EXACT)


def test_cross_entropy_by_hand(prior, teacher):
    z = latents()
    gradient, losses = Guidance(prior.decode, teacher, LossWeights(0.0, 2.0)).gradient(z, LABELS, 4)
    logits = teacher.logits(prior.decode(z))
    torch.testing.assert_close(losses["cls"], logits.logsumexp(1) - logits.gather(1, LABELS[:, None])[:, 0], **EXACT)
    expected = by_hand(lambda leaf: 2 * F.nll_loss(teacher.logits(prior.decode(leaf)).log_softmax(1), LABELS,
                                                   reduction="sum"), z)  # fmt: skip
    torch.testing.assert_close(gradient, expected, **EXACT)
    assert set(losses) == {"cls"}  # a loss of weight 0 is not computed


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_adversarial_loss_by_hand(prior, teacher, kernels):
    if kernels == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernel is not interpreted here; natively in tests/kernels")
    z, student = latents(), classifier(seed=9, dtype=F64, norm=False)
    for network in (teacher, student):  # centred, or one class would win everywhere
        network.module[-1].bias -= network.logits(prior.decode(z)).mean(0)
    weights = LossWeights(0.0, 0.0, 1.5)
    gradient, losses = Guidance(prior.decode, teacher, weights, student, kernels=kernels).gradient(z, LABELS, 3)

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


@pytest.mark.parametrize(
    "derive",
    [
        lambda g, p: g,
        lambda g, p: g.on_pixels(),
        lambda g, p: g.at_decoder(p),
        lambda g, p: CompiledGuidance(g, {}),
        lambda g, p: CompiledGuidance(g, {}).on_pixels(),
    ],
)
def test_every_guidance_takes_the_kernels_it_was_asked_for(prior, teacher, derive, monkeypatch):
    """Wherever the gradient is taken, by engines or not: counted, and none in torch."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernel is not interpreted here")
    launches, own = [], soft_kl._launch
    monkeypatch.setattr(soft_kl, "_launch", lambda *given: launches.append(given) or own(*given))
    prior.scaling_factor, prior.decoder_input, prior.decode_input = 1.0, NetworkInput(), prior.decode
    for kernels, wanted in (("torch", 0), ("triton", 1)):
        made = derive(Guidance(prior.decode, teacher, LossWeights(0.0, 1.0, 1.0), teacher, kernels=kernels), prior)
        point = latents() if made.decode is not identity else prior.decode(latents())
        made.gradient(point, LABELS, 7)
        assert len(launches) == wanted


def test_adversarial_loss_pushes_away_from_agreement():
    teacher = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    loss = adversarial_loss(teacher, student)
    assert loss[0] < 0 and loss[1] == 0
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient[0, 0] > 0 > gradient[0, 1]  # downhill the student is less sure of the class both name


def test_loss_scale_is_taken_back_exactly():
    prior, teacher, z = SmallPrior(), classifier(), latents(torch.float32)
    plain, scaled = (
        Guidance(prior.decode, teacher, LossWeights(0.3, 0.7), loss_scale=scale).gradient(z, LABELS, 3)[0]
        for scale in (1.0, 1024.0)
    )
    assert torch.equal(plain, scaled)  # a power of two moves exponents alone


def test_a_sure_teachers_gradient_keeps_its_direction():
    """At a probability of 1 - 1e-9, softmax - onehot in float32 would be rounding."""
    prior, teacher, z = SmallPrior(), classifier(), latents(torch.float32)
    with torch.no_grad():
        teacher.module[-1].weight *= 300
        teacher.module[-1].bias *= 300
    exact_prior, exact = SmallPrior(dtype=F64), classifier(dtype=F64)
    exact.module.load_state_dict(teacher.module.state_dict())
    logits = exact.logits(exact_prior.decode(z.double()))
    labels = logits.argmax(1)
    margin = logits.topk(2).values.diff(dim=1).abs()[:, 0]
    assert ((margin > 18) & (margin < 30)).any()
    weights = LossWeights(0.0, 1.0)
    got, _ = Guidance(prior.decode, teacher, weights).gradient(z, labels, 7)
    expected, _ = Guidance(exact_prior.decode, exact, weights).gradient(z.double(), labels, 7)
    cosine = F.cosine_similarity(scaled(got.double(), "rms").flatten(1), scaled(expected, "rms").flatten(1))
    assert (cosine[margin < 30] > 0.999).all()  # beyond, 1 - p is lost to float64 too


def test_refusals(prior, teacher):
    without = classifier(dtype=F64, norm=False)
    with pytest.raises(ValueError, match="has no BatchNorm layer"):
        Guidance(prior.decode, without, LossWeights(0.1, 1.0))
    Guidance(prior.decode, without, LossWeights(0.0, 1.0))
    with pytest.raises(ValueError, match="needs a student"):
        Guidance(prior.decode, teacher, LossWeights(0.1, 1.0, 1.0))
    for arguments, message in (
        ({"bn": -1.0, "cls": 1.0}, "must be >= 0"),
        ({"bn": 1.0, "cls": 1.0, "bn_stats": "batch"}, "image or group, got 'batch'"),
        ({"bn": 1.0, "cls": 1.0, "bn_loss": "square"}, "norm, relative, got 'square'"),
    ):
        with pytest.raises(ValueError, match=message):
            LossWeights(**arguments)
