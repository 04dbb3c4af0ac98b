"""Guidance by its settings: each acts as its equation says, alone and beside the others, or is refused."""

import pytest
import torch
import torch.nn.functional as F

from dfkd.config import GenerateConfig, GuidanceConfig
from dfkd.errors import UsageError
from dfkd.synthesis.losses import Adversarial, CrossEntropy, Seen, TotalVariation, losses_of
from dfkd.synthesis.pack import INITIAL_NOISE
from dfkd.synthesis.plan import make_plan, predict
from dfkd.synthesis.sampler import begun, sample, smoothed, unit_rms
from dfkd.synthesis.schedule import build_table
from dfkd_kernels.philox import philox_normal
from tests.synthesis.small_networks import SCHEDULER, SmallPrior, classifier, pipeline

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-9}
SEED = 3


def made(own=None, **settings):
    return pipeline(**(own or {}), **settings)(range(7), seed=SEED).images.int()


def seen(student=None):
    random = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 5, 4, generator=random, dtype=F64)
    teacher, other = (torch.randn(6, 4, generator=random, dtype=F64).requires_grad_() for _ in range(2))
    return Seen(images, teacher, torch.tensor([0, 3, 1, 2, 2, 0]), student_logits=other)


def test_temperature_and_discount_by_hand():
    """log p(x, y) - log p(x) of EluCD: t times the label's logit, less the log-sum-exp of d t times all."""
    of = seen()
    own = of.logits.gather(1, of.labels[:, None])[:, 0]
    got = CrossEntropy(1.0, 0.7, 0.5)(of)
    torch.testing.assert_close(got, (0.35 * of.logits).logsumexp(1) - 0.7 * own, **EXACT)
    (slope,) = torch.autograd.grad(got.sum(), of.logits)
    torch.testing.assert_close(
        slope, 0.35 * (0.35 * of.logits).softmax(1) - 0.7 * F.one_hot(of.labels, 4).double(), **EXACT
    )
    hot = CrossEntropy(1.0, 0.7)(of)
    torch.testing.assert_close(hot, F.cross_entropy(0.7 * of.logits, of.labels, reduction="none"), **EXACT)
    near = CrossEntropy(1.0, 0.7, 1 - 1e-12)(of)  # both forms meet
    torch.testing.assert_close(near, hot, rtol=1e-9, atol=1e-9)


def test_adversarial_losses_by_hand():
    of = seen()
    student, labels = of.student_logits, of.labels
    q = student.softmax(1)
    torch.testing.assert_close(Adversarial(1.0, "entropy")(of), (q * q.log()).sum(1), **EXACT)
    both = [F.cross_entropy(logits, labels, reduction="none") for logits in (student, of.logits)]
    got = Adversarial(1.0, "reference", 0.3)(of)
    torch.testing.assert_close(got, 0.3 * both[1] - both[0], **EXACT)
    slopes = torch.autograd.grad(got.sum(), [of.logits, student])  # the teacher's label is pulled as well
    hot = F.one_hot(labels, 4)
    torch.testing.assert_close(slopes[0], 0.3 * (of.logits.softmax(1) - hot), **EXACT)
    torch.testing.assert_close(slopes[1], hot - q, **EXACT)


@pytest.mark.parametrize("kind", ["kl", "entropy", "reference"])
def test_a_clamped_adversarial_loss_stops_pulling(kind):
    of = seen()
    plain = -Adversarial(1.0, kind)(of)
    limit = float(plain.detach().sort().values[-2]) - 1e-9  # two lie beyond it
    clamped = Adversarial(1.0, kind, clamp=limit)(of)
    torch.testing.assert_close(-clamped, plain.clamp_max(limit), **EXACT)
    (slope,) = torch.autograd.grad(clamped.sum(), of.student_logits)
    assert ((slope == 0).all(1) == (plain > limit) | (plain == 0)).all() and (plain > limit).sum() == 2


def test_total_variation_by_hand():
    of, x = seen(), seen().images
    down, across = (x[:, :, 1:] - x[:, :, :-1]).abs(), (x[..., 1:] - x[..., :-1]).abs()
    torch.testing.assert_close(TotalVariation(1.0)(of), down.mean((1, 2, 3)) + across.mean((1, 2, 3)), **EXACT)


def test_settings_reach_the_losses():
    config = GuidanceConfig.of(joint_temperature=0.7, margin_discount=0.5, adv_weight=2.0, adv_loss="reference",
                               adv_reference=0.3, adv_clamp=4.0, tv_weight=0.1, bn_weight=0.0)  # fmt: skip
    cls, adv, tv = losses_of(config)
    assert (cls, tv) == (CrossEntropy(1.0, 0.7, 0.5), TotalVariation(0.1))
    assert adv == Adversarial(2.0, "reference", 0.3, 4.0)


STUDENT = {"student": classifier(seed=9)}


@pytest.mark.parametrize(
    "own, base",
    [
        ({"guidance_power": 1.0}, {}),
        ({"guidance_power": 1.0}, {"gradient": "unet"}),
        ({"joint_temperature": 0.5}, {}),
        ({"margin_discount": 0.5}, {}),
        ({"tv_weight": 5.0}, {}),
        ({"adv_loss": "entropy"}, {"adv_weight": 1.0}),
        ({"adv_loss": "reference"}, {"adv_weight": 1.0}),
        ({"adv_reference": 0.2}, {"adv_weight": 1.0, "adv_loss": "reference"}),
        ({"adv_clamp": 1e-3}, {"adv_weight": 5.0}),
        ({"refine_smooth": 1.0}, {"refine_steps": 2}),
        ({"reencode": 1}, {}),
        ({"reencode": 2}, {"reencode": 1}),
        ({"reencode_level": 0.75}, {"reencode": 1}),
        ({"reencode": 1}, {"gradient": "unet"}),
    ],
)
def test_every_option_acts(own, base):
    networks = STUDENT if "adv_weight" in base else {}
    assert not torch.equal(made(networks, **{**base, **own}), made(networks, **base))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"adv_loss": "entropy"}, "--adv-loss needs --adv-weight above 0"),
        ({"adv_clamp": 4.0}, "--adv-clamp needs --adv-weight above 0"),
        ({"adv_weight": 1.0, "adv_reference": 0.5}, "--adv-reference needs --adv-loss reference"),
        ({"cls_weight": 0.0, "margin_discount": 0.5}, "--margin-discount needs --cls-weight above 0"),
        ({"cls_weight": 0.0, "joint_temperature": 0.5}, "--joint-temperature needs --cls-weight above 0"),
        ({"refine_smooth": 1.0}, "--refine-smooth needs --refine-steps above 0"),
        ({"reencode_level": 0.5}, "--reencode-level needs --reencode above 0"),
        ({"adv_loss": "js"}, "it must be one of kl, entropy, reference"),
    ],
)
def test_what_would_not_act_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerateConfig.of(**settings)


def test_losses_out_of_range_are_refused():
    for make in (lambda: CrossEntropy(1.0, 0.0), lambda: CrossEntropy(1.0, 1.0, 1.5), lambda: Adversarial(1.0, "js"),
                 lambda: Adversarial(1.0, clamp=-1.0)):  # fmt: skip
        with pytest.raises(ValueError, match="of the loss"):
            make()


@pytest.mark.parametrize("sampler, prior", [("ddim", None), ("euler", {"prediction_type": "flow"})])
def test_a_step_is_shorter_by_its_share_of_noise(sampler, prior):
    """sigma of a variance-preserving level, the time of a rectified flow."""
    small = SmallPrior()
    if prior:
        small.scheduler_config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    pipe = pipeline(prior=small, sampler=sampler, guidance_power=1.5)
    table = build_table(small.scheduler_config, sampler, 4)
    share = table.timesteps / 1000 if prior else table.sigma
    torch.testing.assert_close(torch.tensor(pipe.lengths, dtype=F64), 0.2 * share**1.5, rtol=1e-6, atol=0)
    assert pipeline().lengths == [0.2] * 4


def test_a_smoothed_gradient_by_hand():
    """Each pixel is the mean of all by a Gaussian of their distance; what is constant stays."""
    x = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    y, across = (torch.exp(-0.5 * ((torch.arange(n)[:, None] - torch.arange(n)) / 1.3) ** 2).double() for n in (6, 5))
    want = torch.einsum("ik,jl,bckl->bcij", y / y.sum(1, keepdim=True), across / across.sum(1, keepdim=True), x)
    torch.testing.assert_close(smoothed(x, 1.3), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(smoothed(torch.ones_like(x), 2.0), torch.ones_like(x), **EXACT)
    assert smoothed(x, 0.0) is x


def test_windows_of_cfg_and_guidance_act_and_combine():
    """cfg in the first half without guidance, guidance in the second at one denoiser row an image."""
    own = {"steps": 8, "cfg_to": 0.5, "guide_from": 0.5}
    pipe = pipeline(**own)
    pipe(range(7), seed=SEED)
    assert [rows for rows, _ in pipe.prior.calls] == [14] * 4 + [7] * 4
    assert [pipe.repeats_at(i) for i in range(8)] == [0] * 4 + [1] * 4
    images = made(**own)
    for other in ({"cfg_to": 0.6}, {"guide_from": 0.3}, {"cfg_from": 0.2}, {"guide_to": 0.8}):
        assert not torch.equal(made(**{**own, **other}), images)


def test_re_encoding_by_hand():
    """Encode, noise to the level, denoise with guidance in latents, refine: the image is that of these steps."""
    settings = {"refine_steps": 2, "bn_stats": "image"}
    before = pipeline(**settings)
    pack = before.pack(torch.arange(7), SEED)
    images = before._refined(pack, pack.decode(before.latents(pack)))

    z0, table, rows = before.prior.encode(images), before.table, before.table.coefficients(images, before.cfg)
    noise = philox_normal(SEED, pack.ids, len(table) + 1 + INITIAL_NOISE, tuple(z0.shape[1:]))
    z = float(table.alpha[2]) * z0 + float(table.sigma[2]) * noise  # half of 4 steps
    for i in (2, 3):
        free, told = pack.denoise(z, i)
        model = free + 3 * (told - free)
        unguided = rows[i, 0] * z + rows[i, 1] * model
        gradient, _ = before.guidance.gradient(unguided, pack.labels, 7)
        push = -0.2 * unit_rms(gradient)
        z = rows[i, 2] * z + rows[i, 3] * model + rows[i, 6] * push
    images = before._refined(pack, pack.decode(z))
    want = (images.clamp(0, 1) * 255).round()
    got = made(**settings, reencode=1, reencode_level=0.5)
    assert (got - want).abs().max() <= 1  # sums in another order, before the last bit is rounded


@pytest.mark.parametrize("sampler", ["dpmpp2m", "ddpm"])
def test_a_trajectory_that_begins_midway_has_a_first_step_of_first_order(sampler):
    """Its rows are those of a table that begins there, where the sampler's step does not look further back."""
    table = build_table(SCHEDULER, sampler, 20)
    rows = table.coefficients(torch.zeros(1, dtype=F64))
    again = begun(rows[12:])
    assert (again[0, 4] == 0) and torch.equal(again[1:], rows[13:])
    if sampler == "ddpm":
        assert torch.equal(again, rows[12:])
    z = torch.randn(2, 1, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    constant = torch.full_like(z, 0.3)[None]

    def ended(rows, first):
        return sample(z, rows, lambda z, i, images=None: constant, lambda point, i, to_latent=None: point,
                      repeats=lambda i: 0, first=first)  # fmt: skip

    one = ended(again[:1], 12)
    a, s = table.alpha, table.sigma
    if sampler == "dpmpp2m":  # DDIM's step is its first order
        want = a[13] * (z - s[12] * constant[0]) / a[12] + s[13] * constant[0]
        torch.testing.assert_close(one, want, **EXACT)


@pytest.mark.parametrize("own", [{}, {"bn_stats": "image"}, {"sampler": "ddpm"}, {"guide_shift": 2}])
def test_re_encoded_images_do_not_follow_from_their_batch(own):
    settings = {"reencode": 2, "reencode_level": 0.5, "refine_steps": 1, **own}
    assert (made(**settings, batch=3) - made(**settings)).abs().max() <= 2  # float32 in another order, three times over


def test_noise_of_a_further_pass_is_new():
    pipe = pipeline(sampler="ddpm", reencode=2, reencode_level=0.5)
    pack, streams = pipe.pack(torch.arange(7), SEED), []
    for _ in range(3):
        streams += [pack.streams + INITIAL_NOISE, *(pack.noise(i)[2] for i in range(3))]
        pack.restart(torch.zeros(7, 3, 8, 8), 2)
    assert len(set(streams)) == len(streams)


def test_steps_and_plan_count_every_pass():
    pipe, told = pipeline(reencode=2, reencode_level=0.5, refine_steps=3, guide_from=0.25, cfg_to=0.75), []
    assert pipe.steps == 4 + 3 + 2 * (2 + 3)
    pipe.on_progress = told.append
    pipe(range(7), seed=SEED)
    assert told == [(i + 1) / pipe.steps for i in range(pipe.steps)]
    plan = make_plan(pipe, pipe.config)
    calls = {name: timing.calls for name, timing in predict(pipe, plan, "png").items()}
    wanted = {"unet": (2 + 2 + 2 + 1 + 2 * (2 + 1)) / 2, "decode": 3, "encode": 2, "gradient": 3 + 2 * 2}
    assert calls == {**wanted, "pixel_gradient": 9, "write": 7}


def test_re_encoding_that_cannot_be_is_refused():
    with pytest.raises(UsageError, match=r"--reencode-level 0.1 cannot act: .* half of one of the 4 steps. use 0.25"):
        pipeline(reencode=1, reencode_level=0.1)
    assert pipeline(reencode=1, guidance_step=0.0).reencodings == 0


def test_what_encodes_is_told_beside_the_engines():
    pipe = pipeline(reencode=1)
    assert not any("encode:" in line for line in pipe.describe())  # nothing is an engine
    pipe._engines = {"decode": pipe.prior.decode}
    assert pipe.describe()[-1] == "encode: eager (of an encoder there is no engine)"
